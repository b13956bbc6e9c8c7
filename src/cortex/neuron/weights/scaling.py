"""Weights in 8-bit floats and their scales: what config.json says of them, and which tensor scales which.

A weight is its 8-bit float times the scale of its block, which may be a whole row or a whole matrix. How
activations would be quantised is not looked at: here they are not. Knows no torch and reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import msgspec

from cortex.neuron.weights.layout import FP8, READABLE, Scales, TensorInfo
from cortex.wire.errors import LoadFailed

ENDINGS: Final = ("_scale_inv", "_scale")
"""What the name of a weight's scales has after that of the weight. Weights are multiplied by both kinds: the
first one is the inverse only of what they were multiplied by when they were made."""
SCALE_TYPES: Final = ("F32", "BF16", "F16")
_KEYS: Final = ("quantization_config", "compression_config")
_SUPPORTED: Final = "fp8 and, with weights of 8-bit floats, compressed-tensors are"


class Block(NamedTuple):
    """How many rows and columns of a matrix have a scale together; 0 for all of them."""

    rows: int
    columns: int


WHOLE: Final = Block(0, 0)
ROW: Final = Block(1, 0)

_Size = Annotated[int, msgspec.Meta(ge=1)]


class _Fp8(msgspec.Struct):
    fmt: str | None = None
    weight_block_size: tuple[_Size, _Size] | None = None


class _Weights(msgspec.Struct):
    num_bits: int | None = None
    type: str | None = None
    strategy: str | None = None
    symmetric: bool | None = None
    block_structure: tuple[_Size, _Size] | None = None


class _Group(msgspec.Struct):
    """Modules that are quantised alike; without `weights` theirs are not."""

    weights: _Weights | None = None
    format: str | None = None


class _CompressedTensors(msgspec.Struct):
    config_groups: dict[str, _Group]
    format: str | None = None
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


T = TypeVar("T")


def read_blocks(config: Mapping[str, Any], path: Path) -> tuple[Block, ...]:
    """Of which blocks a checkpoint's scales may be, none where it is not quantised; `path` has the `config`.

    Raises LoadFailed that names a method whose weights cannot be read.
    """
    section = next(_sections(config), None)
    if section is None:
        return ()
    method = section.get("quant_method", "unnamed") if isinstance(section, dict) else section
    if method == "fp8":
        return _of_fp8(_convert(section, _Fp8, path), path)
    if method == "compressed-tensors":
        return _of_compressed_tensors(_convert(section, _CompressedTensors, path), path)
    raise _refusal(path, f"the quantization {method!r:.200} ({_SUPPORTED})")


def _sections(config: Mapping[str, Any]) -> Iterator[Any]:
    """A model that reads images too may have it with its text part."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping):
            yield from (part[key] for key in _KEYS if part.get(key) is not None)


def _convert(section: Any, kind: type[T], path: Path) -> T:
    try:
        return msgspec.convert(section, kind)
    except msgspec.ValidationError as error:
        raise LoadFailed(f"{path}: the quantization cannot be read ({error}).") from None


def _of_fp8(found: _Fp8, path: Path) -> tuple[Block, ...]:
    if found.fmt not in (None, "e4m3"):
        raise _refusal(path, f"the quantization 'fp8' of the format {found.fmt!r:.200} (e4m3 is)")
    return (WHOLE, ROW) if found.weight_block_size is None else (Block(*found.weight_block_size),)


def _of_compressed_tensors(found: _CompressedTensors, path: Path) -> tuple[Block, ...]:
    """Which group a module belongs to is not worked out: the shape of its scales tells which of the blocks
    it has, as long as those that are no whole row or matrix are of one size."""
    method = "the quantization 'compressed-tensors'"
    if (found.sparsity_config or {}).get("format", "dense") != "dense":
        raise _refusal(path, f"{method} of sparse weights")
    if found.transform_config:
        raise _refusal(path, f"{method} with transforms of weights")
    blocks: dict[Block, None] = {}
    for name, group in found.config_groups.items():
        weights = group.weights
        if weights is None:
            continue
        form = group.format or found.format
        if (weights.num_bits, weights.type) != (8, "float") or weights.symmetric is False:
            what = f"{weights.num_bits}-bit {weights.type} weights in {name}, {form}"
            raise _refusal(path, f"{method} with {what:.200} (symmetric 8-bit floats are)")
        if form not in (None, "float-quantized", "naive-quantized"):
            raise _refusal(path, f"{method} in the format {form!r:.200} (float-quantized is)")
        blocks[_block(weights, path)] = None
    if len(blocks.keys() - {WHOLE, ROW}) > 1:
        raise _refusal(path, f"{method} with blocks of several sizes")
    return tuple(blocks)


def _block(weights: _Weights, path: Path) -> Block:
    if weights.strategy in (None, "tensor"):
        return WHOLE
    if weights.strategy == "channel":
        return ROW
    if weights.strategy == "block" and weights.block_structure is not None:
        return Block(*weights.block_structure)
    strategy = f"the quantization strategy {weights.strategy!r:.200}"
    raise _refusal(path, f"{strategy} (tensor, channel and block are)")


def _refusal(path: Path, what: str) -> LoadFailed:
    return LoadFailed(f"{path}: {what} is not supported.")


def with_scales(tensors: Mapping[str, TensorInfo], blocks: tuple[Block, ...]) -> dict[str, TensorInfo]:
    """The same tensors, those of 8-bit floats with their scales if there are any, whether they fit or not:
    a tensor that nobody needs may be as it likes."""
    found = dict(tensors)
    for name, tensor in tensors.items():
        scales = next((tensors[name + end] for end in ENDINGS if name + end in tensors), None)
        if tensor.dtype == FP8 and scales is not None and blocks:
            block = next((block for block in blocks if scales.shape in _shapes(tensor, block)), blocks[0])
            sizes = (block.rows or tensor.height or 1, block.columns or tensor.columns or 1)
            found[name] = msgspec.structs.replace(tensor, scales=Scales(scales, *sizes, tensor.height))
    return found


def check_readable(tensor: TensorInfo) -> None:
    """Raises LoadFailed if no numbers can be made of it: its element type is not known, or its scales are
    missing or do not fit."""
    where = f"{tensor.file}: tensor {tensor.name}"
    if tensor.dtype not in READABLE:
        raise LoadFailed(f"{where} is stored as {tensor.dtype}; {', '.join(READABLE)} can be read.")
    if tensor.dtype != FP8:
        return
    if tensor.scales is None:
        names = " or ".join(tensor.name + ending for ending in ENDINGS)
        raise LoadFailed(
            f"{where} is stored as {FP8} and has no scales: a tensor {names} is needed, and in config.json "
            f"a quantization_config that says of which blocks they are."
        )
    scales = tensor.scales.tensor
    wanted = _shapes(tensor, Block(tensor.scales.rows, tensor.scales.columns))
    if scales.shape not in wanted or scales.dtype not in SCALE_TYPES:
        raise LoadFailed(
            f"{scales.file}: tensor {scales.name} has the shape {list(scales.shape)} as {scales.dtype}; as "
            f"scales of tensor {tensor.name} of the shape {list(tensor.shape)} in {tensor.file} it must have "
            f"{list(wanted[0])} as {', '.join(SCALE_TYPES)}."
        )


def _shapes(tensor: TensorInfo, block: Block) -> list[tuple[int, ...]]:
    """Those that the scales of a tensor may have. Of a single matrix, one for each row may be a vector, and
    the only one a number."""
    high = -(-tensor.height // (block.rows or tensor.height or 1))
    wide = -(-tensor.columns // (block.columns or tensor.columns or 1))
    shapes: list[tuple[int, ...]] = [(*tensor.shape[:-2], high, wide)]
    if len(tensor.shape) <= 2 and wide == 1:
        shapes.append((high,))
        if high == 1:
            shapes.append(())
    return shapes
