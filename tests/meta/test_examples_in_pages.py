"""The examples in README and docs: configurations load, programs compile, commands and options exist."""

import json
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from cortex import cli
from cortex.cli import serving
from cortex.config import load_gateway, load_neuron
from house import code, documents

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def examples(language: str) -> list[tuple[str, str]]:
    return [(page.name, block) for page in PAGES for block in documents.fences(page.read_text(), language)]


def command_lines() -> list[tuple[str, list[str]]]:
    """Lines of shell examples that call us, cut into words; continued lines joined."""
    found = []
    for name, block in examples("sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0].rpartition("/")[2] in ("cortex", "neuron"):
                found.append((name, [words[0].rpartition("/")[2], *words[1:]]))
    return found


@pytest.mark.parametrize(("name", "text"), examples("toml"))
def test_a_configuration_in_a_page_loads(name: str, text: str, tmp_path: Path) -> None:
    keys = tomllib.loads(text).keys()
    path = tmp_path / "example.toml"
    path.write_text(text)
    if "gateway" in keys:
        load_gateway(path, {})
    elif "listen" in keys:
        load_neuron(path, {})
    else:
        assert keys == {"project"}, name


@pytest.mark.parametrize(
    ("name", "text"), [example for example in examples("python") if example[0] != "hooks.md"]
)
def test_a_program_in_a_page_compiles(name: str, text: str) -> None:
    compile(text, name, "exec")


@pytest.mark.parametrize(("name", "text"), examples("json"))
def test_json_in_a_page_is_json(name: str, text: str) -> None:
    json.loads(text.replace("{…}", "{}") if text.lstrip().startswith("{") else f"{{{text}}}")


@pytest.mark.parametrize(("name", "words"), command_lines())
def test_a_command_in_a_page_exists_with_its_options(name: str, words: list[str]) -> None:
    commands = code.commands(cli.main, "cortex") | {"neuron": serving.neuron_command}
    known = " ".join(words[:2]) if words[0] == "cortex" else "neuron"
    assert known in commands, name
    options = {word for word in words if re.match(r"--?[a-z]", word)}
    assert options <= code.parameters(commands[known]), name


def test_there_are_examples_of_every_kind() -> None:
    assert len(examples("toml")) >= 3
    assert len(command_lines()) >= 8


@pytest.mark.parametrize(("name", "block"), examples("sh"))
def test_make_targets_in_a_page_exist(name: str, block: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", block, re.MULTILINE)) <= targets, name
