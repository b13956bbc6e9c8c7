from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from cortex.neuron.weights import safetensors
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.files import OpenFile
from cortex.neuron.weights.loader import load
from cortex.neuron.weights.safetensors import read_directory, read_header
from cortex.neuron.weights.source import whole
from cortex.wire.errors import LoadFailed


def file_of(header: Any, data: bytes = bytes(16)) -> bytes:
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], **changes}}


GOOD = file_of(entry())


def test_a_file_of_safetensors_own_writer_is_read(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    save_file({"w": values, "v": torch.ones(4)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_checkpoint(tmp_path) as checkpoint:
        assert (checkpoint.kind, checkpoint.architecture) == ("safetensors", "llama")
        assert sorted(checkpoint.tensors) == ["v", "w"]
        matrix = checkpoint.tensors["w"]
        assert (matrix.dtype, matrix.shape, matrix.row_bytes) == ("BF16", (2, 3), 6)
        assert bytes(checkpoint.rows("w", 1, 2)) == values[1].view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (struct.pack("<Q", 2**40) + b"{}", "a header of 1099511627776 bytes"),
        (file_of(b"{"), "the header is not the JSON"),
        (file_of(b"[" * 100_000), "the header is not the JSON"),
        (file_of(b"[1]"), "the header is not the JSON"),
        (file_of({"w": 3}), "entry of tensor w cannot be read"),
        (file_of(entry(shape=[2, "x"])), "entry of tensor w cannot be read"),
        (file_of(entry(dtype="Q4_0")), "tensor w has the unknown element type Q4_0"),
        (file_of(entry(dtype="F33", data_offsets=[16, 8])), "tensor w needs 0 bytes and has offsets 16 to 8"),
        (
            file_of(entry(dtype="F33", data_offsets=[-8, 8])),
            "tensor w needs 16 bytes and has offsets -8 to 8",
        ),
        (file_of(entry(dtype="F33", data_offsets=[0, 17])), "tensor w ends at byte"),
        (file_of({**entry(dtype="F33"), "v": entry()["w"]}), "overlaps tensor"),
        (file_of(entry(dtype="F33", shape=[2**10, 2**10])), "tensor w has the impossible shape"),
        (file_of(entry(shape=[2, -2])), "tensor w has the impossible shape [2, -2]"),
        (file_of(entry(shape=[2**40, 2**40])), "tensor w has the impossible shape"),
        (file_of(entry(shape=[1] * 9)), "tensor w has 9 dimensions"),
        (file_of(entry(shape=[2, 3])), "tensor w needs 24 bytes and has offsets 0 to 16"),
        (file_of(entry(data_offsets=[16, 32])), "tensor w ends at byte"),
        (file_of(entry(data_offsets=[-16, 0])), "tensor w needs 16 bytes and has offsets -16 to 0"),
        (file_of({**entry(), "v": entry()["w"]}), "overlaps tensor"),
    ],
)
def test_a_broken_header_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(LoadFailed) as caught:
        read_header(path)
    assert said in caught.value.message
    assert str(path) in caught.value.message


def test_a_tensor_of_an_unknown_element_type_is_for_those_to_refuse_who_need_it(tmp_path: Path) -> None:
    """What the next release of the format brings may be of no use to us, and then does no harm."""
    unknown = {"dtype": "F33", "shape": [3, 5], "data_offsets": [16, 19]}
    (tmp_path / "model.safetensors").write_bytes(file_of({**entry(), "v": unknown}, bytes(19)))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with open_checkpoint(tmp_path) as checkpoint:
        found = checkpoint.tensors["v"]
        assert (found.dtype, found.shape, found.nbytes) == ("F33", (3, 5), 3)
        model = nn.Linear(2, 2, bias=False, device="meta")
        with pytest.raises(LoadFailed, match=r"tensor v is stored as F33; F32, F16, .* can be read"):
            load(model, {"weight": whole("v")}, checkpoint, lambda done, total: None)

        def taken(tensors: Mapping[str, Tensor]) -> None:
            assert torch.equal(tensors["weight"], torch.zeros(2, 2))

        model.fill = taken
        load(model, {"weight": whole("w")}, checkpoint, lambda done, total: None)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    for length in range(len(GOOD)):
        path.write_bytes(GOOD[:length])
        with pytest.raises(LoadFailed):
            read_header(path)


@pytest.mark.parametrize("length", [0, 8, 5000])
def test_a_file_that_is_cut_short_while_its_header_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(file_of({**entry(), "__metadata__": {"padding": "x" * 10_000}}))
    assert list(read_header(path)) == ["w"]

    class CutShort(OpenFile):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            os.truncate(path, length)

    monkeypatch.setattr(safetensors, "OpenFile", CutShort)
    with pytest.raises(LoadFailed, match="the file was cut short while it was in use"):
        read_header(path)


@given(at=st.integers(0, len(GOOD) - 17), value=st.binary(min_size=1, max_size=8))
def test_a_changed_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.safetensors"
    content = GOOD[:at] + value + GOOD[at + len(value) :]
    path.write_bytes(content)
    try:
        tensors = read_header(path)
    except LoadFailed as refused:
        assert str(path) in refused.message
    else:
        for found in tensors.values():
            assert found.offset >= 0
            assert found.offset + found.nbytes <= len(content)


def index(directory: Path, weight_map: Any) -> None:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_joined_by_their_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3), "unlisted": torch.ones(1)}, tmp_path / "two.safetensors")
    index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    tensors = read_directory(tmp_path)
    assert {name: tensor.file.name for name, tensor in tensors.items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


@pytest.mark.parametrize(
    ("weight_map", "said"),
    [
        ({"a": "gone.safetensors"}, "gone.safetensors cannot be read"),
        ({"x": "one.safetensors"}, "lacks tensor x"),
        ({"a": "../one.safetensors"}, "is not a plain file name"),
        ({"a": 3}, "the index is not the JSON"),
    ],
)
def test_an_index_that_lies_is_named(tmp_path: Path, weight_map: Any, said: str) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    index(tmp_path, weight_map)
    with pytest.raises(LoadFailed, match=said):
        read_directory(tmp_path)


def test_the_one_file_goes_before_an_index(tmp_path: Path) -> None:
    """As in transformers; what the index names may be the model in an older form."""
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.ones(3)}, tmp_path / "model.safetensors")
    index(tmp_path, {"a": "one.safetensors"})
    assert read_directory(tmp_path)["a"].file.name == "model.safetensors"


def test_a_tensor_in_two_files_without_an_index_is_refused(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(LoadFailed, match="Tensor a is both in"):
        read_directory(tmp_path)
