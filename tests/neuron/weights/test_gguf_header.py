from __future__ import annotations

import os
import struct
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from hypothesis import given
from hypothesis import strategies as st

from cortex.neuron.weights import gguf
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.files import OpenFile
from cortex.neuron.weights.gguf import Header, read_header
from cortex.neuron.weights.layout import BLOCKS
from cortex.wire.errors import LoadFailed

U32, STRING, ARRAY, U64, F32 = 4, 8, 9, 10, 6
Q4_0 = 2


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def strings(*values: str) -> bytes:
    return struct.pack("<IQ", STRING, len(values)) + b"".join(text(value) for value in values)


def tensor(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    head = text(name) + struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return head + struct.pack("<IQ", kind, offset)


def file_of(
    pairs: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    magic: bytes = b"GGUF",
) -> bytes:
    tensor_count, pair_count = counts or (len(tensors), len(pairs))
    header = magic + struct.pack("<IQQ", version, tensor_count, pair_count) + b"".join(pairs + tensors)
    return header + bytes(-len(header) % 32) + data


NAME = pair("general.architecture", STRING, text("llama"))
PAIRS = [
    NAME,
    pair("llama.block_count", U32, struct.pack("<I", 2)),
    pair("tokenizer.ggml.tokens", ARRAY, strings("a", "ü", "")),
    pair("numbers", ARRAY, struct.pack("<IQ3f", F32, 3, 0.5, 1.0, 2.0)),
    pair("nested", ARRAY, struct.pack("<IQ", ARRAY, 1) + strings("x")),
]
TENSORS = [tensor("w", [32, 2], Q4_0, 0), tensor("v", [4], 0, 64)]
GOOD = file_of(PAIRS, TENSORS, bytes(80))


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def write_and_read(content: bytes) -> Header:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return read_header(path)

    return write_and_read


@pytest.mark.parametrize("version", [2, 3])
def test_metadata_and_tensors_are_read(read: Any, tmp_path: Path, version: int) -> None:
    header = read(file_of(PAIRS, TENSORS, bytes(80), version=version))
    assert header.version == version
    assert header.metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "tokenizer.ggml.tokens": ["a", "ü", ""],
        "numbers": [0.5, 1.0, 2.0],
        "nested": [["x"]],
    }
    matrix, vector = header.tensors["w"], header.tensors["v"]
    assert (matrix.dtype, matrix.shape, matrix.nbytes, matrix.row_bytes) == ("Q4_0", (2, 32), 36, 18)
    assert (vector.dtype, vector.shape, vector.rows, vector.columns) == ("F32", (4,), 4, 1)
    assert vector.offset == matrix.offset + 64 == len(GOOD) - 16


def test_a_file_of_ggufs_own_writer_is_read_alike(tmp_path: Path) -> None:
    path = tmp_path / "written.gguf"
    writer = GGUFWriter(path, "qwen2")
    writer.add_custom_alignment(64)
    writer.add_uint64("big", 2**40)
    writer.add_array("merges", [f"merge {index}" for index in range(100)])
    values = numpy.arange(6, dtype=numpy.float32).reshape(2, 3)
    writer.add_tensor("first", values)
    blocks = numpy.zeros((4, 34), dtype=numpy.uint8)
    writer.add_tensor("second", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.architecture == "qwen2"
        assert checkpoint.metadata["big"] == 2**40
        assert checkpoint.metadata["merges"][99] == "merge 99"
        assert checkpoint.tensors["second"].shape == (4, 32)
        assert checkpoint.tensors["second"].offset % 64 == 0
        assert bytes(checkpoint.rows("first", 1, 2)) == values[1].tobytes()


def test_a_large_vocabulary_is_read_quickly(read: Any) -> None:
    tokens = [f"token{index}" for index in range(150_000)]
    content = file_of([NAME, pair("tokens", ARRAY, strings(*tokens))], [])
    start = time.process_time()
    header = read(content)
    assert time.process_time() - start < 1.0
    assert header.metadata["tokens"][-1] == "token149999"


def entry(
    name: str = "w", dims: tuple[int, ...] = (32, 2), kind: int = Q4_0, offset: int = 0, data: int = 64
) -> bytes:
    return file_of([NAME], [tensor(name, list(dims), kind, offset)], bytes(data))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b"GGML" + GOOD[4:], "not a GGUF file"),
        (GOOD[:2], "ends within the preamble"),
        (file_of([], [], version=1), "has GGUF version 1"),
        (file_of([], [], version=3 << 24), "is big-endian"),
        (file_of([], [], counts=(2**62, 0)), "claims 4611686018427387904 tensors"),
        (file_of([], [], counts=(0, 10**6)), "claims 1000000 metadata entries"),
        (file_of([pair("a", 77, b"")], [], bytes(64)), "entry a has the unknown value type 77"),
        (file_of([pair("a", STRING, struct.pack("<Q", 2**40))], []), "within metadata entry a"),
        (file_of([pair("a", ARRAY, struct.pack("<IQ", U64, 2**60))], []), "elements in metadata entry a"),
        (file_of([pair("a", ARRAY, struct.pack("<IQ", STRING, 99))], [], bytes(64)), "claims 99 elements"),
        (file_of([pair("a", STRING, struct.pack("<Q", 1) + b"\xff")], []), "entry a holds text that is not"),
        (file_of([NAME, NAME], []), "general.architecture occurs twice"),
        (file_of([pair("general.alignment", U32, struct.pack("<I", 0))], []), "general.alignment is 0"),
        (file_of([pair("general.alignment", U32, struct.pack("<I", 48))], []), "not a power of two"),
        (entry(kind=99), "tensor w has the unknown element type 99"),
        (entry(kind=4), "tensor w has the unknown element type 4"),
        (entry(dims=()), "tensor w has 0 dimensions"),
        (entry(dims=(1,) * 5), "tensor w has 5 dimensions"),
        (entry(dims=(0, 2)), "tensor w has the impossible shape [2, 0]"),
        (entry(dims=(2**40, 2**40)), "tensor w has the impossible shape"),
        (entry(dims=(33, 2)), "tensor w has rows of 33"),
        (entry(offset=7), "tensor w is not aligned"),
        (entry(offset=2**62), "tensor w ends at byte"),
        (entry(data=20), "tensor w ends at byte"),
        (file_of([], [tensor("w", [32], 0, 0), tensor("v", [4], 0, 64)], bytes(128)), "v overlaps tensor w"),
        (file_of([], [tensor("w", [4], 0, 0), tensor("w", [4], 0, 32)], bytes(64)), "tensor w occurs twice"),
    ],
)
def test_a_broken_header_is_named(read: Any, tmp_path: Path, content: bytes, said: str) -> None:
    with pytest.raises(LoadFailed) as caught:
        read(content)
    assert said in caught.value.message
    assert str(tmp_path / "model.gguf") in caught.value.message


def test_deep_nesting_is_refused_without_recursion(read: Any) -> None:
    deep = struct.pack("<IQ", ARRAY, 1) * 10_000 + strings("x")
    with pytest.raises(LoadFailed, match="unknown value type"):
        read(file_of([pair("a", ARRAY, deep)], []))


def test_every_truncation_is_refused(read: Any) -> None:
    for length in range(len(GOOD)):
        with pytest.raises(LoadFailed):
            read(GOOD[:length])


@pytest.mark.parametrize("length", [0, 4, 5000, gguf.WINDOW, gguf.WINDOW + 5000])
def test_a_file_that_is_cut_short_while_its_header_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(file_of([NAME, pair("tokens", ARRAY, strings(*["a token"] * 40_000))], []))
    assert len(read_header(path).metadata["tokens"]) == 40_000

    class CutShort(OpenFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            os.truncate(path, length)

    monkeypatch.setattr(gguf, "OpenFile", CutShort)
    with pytest.raises(LoadFailed, match=r"model\.gguf: the file was cut short while it was in use"):
        read_header(path)


def test_what_lies_over_the_border_of_a_window_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.gguf"
    long = "x" * 300
    path.write_bytes(file_of([*PAIRS, pair("long", STRING, text(long))], TENSORS, bytes(80)))
    expected = read_header(path)
    assert expected.metadata["long"] == long
    for window in range(1, 320):
        monkeypatch.setattr(gguf, "WINDOW", window)
        assert read_header(path) == expected


@given(at=st.integers(0, len(GOOD) - 81), value=st.binary(min_size=1, max_size=8))
def test_a_changed_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.gguf"
    path.write_bytes(GOOD[:at] + value + GOOD[at + len(value) :])
    try:
        header = read_header(path)
    except LoadFailed as refused:
        assert str(path) in refused.message
    else:
        for found in header.tensors.values():
            assert found.offset + found.nbytes <= len(GOOD)


@given(content=st.binary(max_size=200))
def test_garbage_after_the_preamble_is_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "garbage.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + content)
    with pytest.raises(LoadFailed):
        read_header(path)


def test_block_sizes_are_ggmls() -> None:
    for kind, sizes in GGML_QUANT_SIZES.items():
        assert BLOCKS[kind.name] == sizes
