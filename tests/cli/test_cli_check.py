"""`cortex check`: which file it is, what is in it, and what is wrong with it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(cortex):
    return lambda *args: cortex("check", *args)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("file", "found"),
    [
        (
            "cortex.example.toml",
            "a gateway on 0.0.0.0:31313, metrics on 0.0.0.0:31314; 2 neurons (beast, benjy)",
        ),
        ("models.example.toml", "2 models (smollm2-135m, Qwen/Qwen3.6-27B); 1 alias (default)"),
        ("neuron.example.toml", "a neuron on 0.0.0.0:13131; models in /var/lib/neuron/models; no node_token"),
    ],
)
def test_the_shipped_examples_are_told_apart_by_their_keys(check, file: str, found: str) -> None:
    result = check("-c", ROOT / file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"ok: {ROOT / file}: {found}")


def test_a_gateway_file_is_checked_with_its_catalogue(check, tmp_path: Path) -> None:
    write(tmp_path / "models.toml", "[[models]]\nid = 'a'\nvrm_mb = 3\n")
    result = check("-c", write(tmp_path / "x.toml", "[gateway]\n"))
    assert result.exit_code == 2
    assert "models.toml: models.vrm_mb" in result.stderr


def test_an_error_is_one_line_that_names_file_key_and_remedy(check, tmp_path: Path) -> None:
    file = write(tmp_path / "cortex.toml", "[gateway]\nlisten = '127.0.0.1:1'\nmetrics_lsten = 'x'\n")
    result = check("-c", file)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert (
        result.stderr
        == f"error: {file}: gateway.metrics_lsten: unknown key; did you mean 'metrics_listen'?\n"
    )


@pytest.mark.parametrize("text", ["[gateway", "\x00", None])
def test_a_file_that_cannot_be_read_is_one_line(check, tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "neuron.toml"
    if text is not None:
        write(file, text)
    result = check("-c", file)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {file}: ")
    assert result.stderr.count("\n") == 1


def test_bytes_that_are_no_text_are_one_line(check, tmp_path: Path) -> None:
    file = tmp_path / "cortex.toml"
    file.write_bytes(b"\xff\xfe\x00")
    result = check("-c", file)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_the_name_decides_where_keys_do_not(check, tmp_path: Path) -> None:
    assert ": a neuron on " in check("-c", write(tmp_path / "neuron.toml", "")).stdout
    assert "--kind cortex, models, neuron" in check("-c", write(tmp_path / "x.toml", "")).stderr


def test_kind_overrules_the_keys(check, tmp_path: Path) -> None:
    file = write(tmp_path / "cortex.toml", "[gateway]\n")
    assert "gateway: unknown key" in check("-c", file, "--kind", "neuron").stderr
