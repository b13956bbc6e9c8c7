"""The headers of safetensors files: one file, or the shards that an index names.

Reads headers only and believes nothing in them. Knows no torch and no model.
Format: the safetensors repository's README, section Format.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import msgspec

from cortex.neuron.weights.files import OpenFile, decode_json, read_json
from cortex.neuron.weights.layout import (
    BLOCKS,
    READABLE,
    TensorInfo,
    check_extents,
    damaged,
    stored_bytes,
)
from cortex.wire.errors import LoadFailed

INDEX: Final = "model.safetensors.index.json"
SINGLE: Final = "model.safetensors"
MAX_HEADER: Final = 100_000_000
"""Bytes; the bound of the format's reference reader."""
MAX_DIMENSIONS: Final = 8


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_directory(directory: Path) -> dict[str, TensorInfo]:
    """All tensors of a checkpoint: `model.safetensors`, else by its index, else every safetensors file. That
    one file goes before an index, which may be left from an older form of the model, as in transformers.

    Raises LoadFailed that names the file and tensor at fault.
    """
    single = directory / SINGLE
    if not single.is_file() and (directory / INDEX).is_file():
        return _read_indexed(directory)
    files = [single] if single.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise LoadFailed(f"{directory} holds no *.safetensors file.")
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for name, tensor in read_header(file).items():
            if name in tensors:
                raise LoadFailed(f"Tensor {name} is both in {tensors[name].file} and in {file}.")
            tensors[name] = tensor
    return tensors


def _read_indexed(directory: Path) -> dict[str, TensorInfo]:
    path = directory / INDEX
    index = read_json(path, _Index, "the index")
    shards: dict[str, dict[str, TensorInfo]] = {}
    tensors: dict[str, TensorInfo] = {}
    for name, shard in index.weight_map.items():
        if shard not in shards:
            if Path(shard).name != shard:
                raise LoadFailed(f"{path}: shard {shard!r} of tensor {name} is not a plain file name.")
            shards[shard] = read_header(directory / shard)
        if name not in shards[shard]:
            raise LoadFailed(f"{directory / shard} lacks tensor {name}, which {INDEX} places there.")
        tensors[name] = shards[shard][name]
    return tensors


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one file. Raises LoadFailed."""
    with OpenFile(path) as file:
        size = file.size
        length = int.from_bytes(file.read(0, min(size, 8)), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise damaged(path, f"a header of {length} bytes cannot be in a file of {size} bytes")
        header = file.read(8, length)
    entries = decode_json(header, dict[str, Any], path, "the header")
    entries.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, 8 + length, size) for name, entry in entries.items()}
    check_extents(path, tensors.values(), size)
    return tensors


def _tensor(path: Path, name: str, plain: Any, start: int, size: int) -> TensorInfo:
    try:
        entry = msgspec.convert(plain, _Entry)
    except msgspec.ValidationError as error:
        raise damaged(path, f"the entry of tensor {name} cannot be read ({error})") from None
    is_known = BLOCKS.get(entry.dtype, (0, 0))[0] == 1
    if not is_known and entry.dtype in READABLE:  # a name of GGUF, as which nobody may read it
        raise LoadFailed(f"{path}: tensor {name} has the unknown element type {entry.dtype}.")
    if len(entry.shape) > MAX_DIMENSIONS:
        raise damaged(path, f"tensor {name} has {len(entry.shape)} dimensions")
    elements = 1
    for dimension in entry.shape:
        elements *= dimension
        if dimension < 0 or elements > 8 * size:  # of a bit each
            raise damaged(path, f"tensor {name} has the impossible shape {entry.shape}")
    begin, end = entry.data_offsets
    # What an unknown type takes, the file alone says; whoever needs such a tensor refuses it.
    nbytes = stored_bytes(entry.dtype, elements) if is_known else max(0, end - begin)
    if begin < 0 or end - begin != nbytes:
        raise damaged(path, f"tensor {name} needs {nbytes} bytes and has offsets {begin} to {end}")
    return TensorInfo(name, entry.dtype, tuple(entry.shape), path, start + begin, nbytes)
