from __future__ import annotations

from pathlib import Path

import numpy
import pytest
from gguf import GGUFWriter

from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.wire.errors import LoadFailed


def write_gguf(path: Path, architecture: str = "llama", **integers: int) -> None:
    writer = GGUFWriter(path, architecture)
    for key, value in integers.items():
        writer.add_uint32(key.replace("_", "."), value)
    writer.add_tensor("w", numpy.ones((64, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"nothing\.gguf does not exist"):
        open_checkpoint(tmp_path / "nothing.gguf")
    with pytest.raises(LoadFailed, match="cannot be read: File name too long"):
        open_checkpoint(tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (None, r"config\.json cannot be read"),
        ("{", "the configuration is not the JSON"),
        ("[]", "the configuration is not the JSON"),
        ("{}", r"config\.json names no model_type"),
        ('{"model_type": "llama"}', r"holds no \*\.safetensors file"),
    ],
)
def test_a_directory_without_a_model_is_named(tmp_path: Path, config: str | None, said: str) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(LoadFailed, match=said):
        open_checkpoint(tmp_path)


def write_parts(folder: Path) -> list[Path]:
    """A GGUF file in two parts, as llama-gguf-split makes them: the first has the metadata and no tensor."""
    paths = [folder / f"model-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    for number, path in enumerate(paths):
        writer = GGUFWriter(path, "llama")
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", len(paths))
        if number == 0:
            writer.add_uint32("llama.block_count", 7)
        else:
            writer.add_tensor(f"w{number}", numpy.full((4, 64), number, dtype=numpy.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return paths


@pytest.mark.parametrize("named", [0, 2])
def test_the_parts_of_a_split_file_are_one_checkpoint(tmp_path: Path, named: int) -> None:
    paths = write_parts(tmp_path)
    with open_checkpoint(paths[named]) as checkpoint:
        assert checkpoint.metadata["llama.block_count"] == 7
        assert {name: tensor.file for name, tensor in checkpoint.tensors.items()} == {
            "w1": paths[1],
            "w2": paths[2],
        }
        assert bytes(checkpoint.rows("w2", 0, 1)) == numpy.full(64, 2, dtype=numpy.float32).tobytes()


def test_a_split_file_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    paths = write_parts(tmp_path)
    paths[0].rename(tmp_path / "other.gguf")
    with pytest.raises(LoadFailed, match="one of 3 parts, and its name does not say so"):
        open_checkpoint(tmp_path / "other.gguf")
    with pytest.raises(LoadFailed, match=r"00001-of-00003\.gguf cannot be read"):
        open_checkpoint(paths[1])
    paths[1].rename(paths[0])
    with pytest.raises(LoadFailed, match=r"00001-of-00003\.gguf is not part 1 of 3"):
        open_checkpoint(paths[2])


def test_rows_of_a_file_that_was_cut_short_are_refused_not_a_bus_error(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    with open_checkpoint(path) as checkpoint:
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size - 8192)
        with pytest.raises(LoadFailed, match="cut short"):
            checkpoint.rows("w", 63, 64)
        with pytest.raises(LoadFailed, match="cut short"):
            checkpoint.data(path)


def test_reading_rows_maps_nothing(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.rows("w", 62, 64) == numpy.ones(128, dtype=numpy.float32).tobytes()
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_closing_unmaps_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    checkpoint = open_checkpoint(path)
    content = checkpoint.data(path)
    assert str(path) in Path("/proc/self/maps").read_text()
    checkpoint.close()
    assert content[:4] == b"GGUF"  # who still reads is not disturbed
    content.release()
    del content
    assert str(path) not in Path("/proc/self/maps").read_text()
