"""The header of a GGUF file: metadata and where each tensor lies. Versions 2 and 3, little-endian.

Reads some of it at a time and believes nothing: counts, lengths, offsets and types are held against
the file's size before anything is allocated. Knows no torch and no model.
Format: ggml/docs/gguf.md of the ggml repository.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Final

import msgspec

from cortex.neuron.weights.files import OpenFile
from cortex.neuron.weights.layout import BLOCKS, TensorInfo, check_extents, damaged, stored_bytes
from cortex.wire.errors import LoadFailed

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
DEFAULT_ALIGNMENT: Final = 32
MAX_DIMENSIONS: Final = 4
MAX_NESTING: Final = 4
MAX_ELEMENTS: Final = 2**21
"""Elements of one metadata array: four times the longest list of merges."""
MAX_HEADER: Final = 2**27
"""Bytes of metadata and tensor entries: four times those of the largest vocabulary."""
WINDOW: Final = 2**18
"""Bytes of the header that are read and kept at a time."""

TYPES: Final[dict[int, str]] = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    9: "Q8_1",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
}
"""Element types by their number in the file (enum ggml_type in ggml.h)."""

_SCALARS: Final = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_STRING: Final = 8
_ARRAY: Final = 9
_U32: Final = _SCALARS[4]
_U64: Final = _SCALARS[10]


class Header(msgspec.Struct, frozen=True):
    """What a GGUF file says of itself; metadata values are plain Python."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Raises LoadFailed that names the file and, where there is one, the key or tensor at fault."""
    with OpenFile(path) as file:
        return _Cursor(file).header()


class _Cursor:
    """Reads forward through the header; `where` says for an error what was being read."""

    def __init__(self, file: OpenFile) -> None:
        self._file = file
        self._path = file.path
        self._size = file.size
        self._end = min(self._size, MAX_HEADER)
        self._window = b""
        self._start = 0
        """Where the window lies in the file."""
        self._within = 0
        """How much of the window has been read."""
        self._where = "the preamble"

    @property
    def _at(self) -> int:
        return self._start + self._within

    def header(self) -> Header:
        if self._take(len(MAGIC)) != MAGIC:
            raise LoadFailed(f"{self._path} is not a GGUF file: it does not start with the letters GGUF.")
        version = int(self._scalar(_U32))
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            kind = "is big-endian" if swapped else f"has GGUF version {version}"
            raise LoadFailed(f"{self._path} {kind}; little-endian versions 2 and 3 can be read.")
        tensor_count = self._count(24, "tensors")
        pair_count = self._count(13, "metadata entries")
        metadata = self._metadata(pair_count)
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise damaged(self._path, f"general.alignment is {alignment!r}, not a power of two")
        return Header(version, metadata, self._tensors(tensor_count, alignment))

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            self._where = f"the metadata entry after {next(reversed(metadata), 'the preamble')}"
            key = self._string()
            self._where = f"metadata entry {key}"
            if key in metadata:
                raise damaged(self._path, f"{self._where} occurs twice")
            metadata[key] = self._value(int(self._scalar(_U32)), 0)
        return metadata

    def _tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        found: list[TensorInfo] = []
        for index in range(count):
            self._where = f"the entry of tensor {index}"
            found.append(self._tensor(alignment))
        start = -(-self._at // alignment) * alignment
        tensors: dict[str, TensorInfo] = {}
        for entry in found:
            if entry.name in tensors:
                raise damaged(self._path, f"tensor {entry.name} occurs twice")
            tensors[entry.name] = msgspec.structs.replace(entry, offset=start + entry.offset)
        check_extents(self._path, tensors.values(), self._size)
        return tensors

    def _tensor(self, alignment: int) -> TensorInfo:
        """One entry; its offset still counts from the start of the data."""
        name = self._string()
        self._where = f"the entry of tensor {name}"
        rank = int(self._scalar(_U32))
        if not 1 <= rank <= MAX_DIMENSIONS:
            raise damaged(self._path, f"tensor {name} has {rank} dimensions")
        shape = tuple(int(self._scalar(_U64)) for _ in range(rank))[::-1]
        kind = int(self._scalar(_U32))
        offset = int(self._scalar(_U64))
        if kind not in TYPES:
            raise LoadFailed(f"{self._path}: tensor {name} has the unknown element type {kind}.")
        dtype = TYPES[kind]
        elements = 1
        for dimension in shape:
            elements *= dimension
            if not 0 < elements <= 8 * BLOCKS[dtype][0] * self._size:
                raise damaged(self._path, f"tensor {name} has the impossible shape {list(shape)}")
        if shape[-1] % BLOCKS[dtype][0]:
            raise damaged(self._path, f"tensor {name} has rows of {shape[-1]}, no whole {dtype} blocks")
        if offset % alignment:
            raise damaged(self._path, f"tensor {name} is not aligned to {alignment} bytes")
        return TensorInfo(name, dtype, shape, self._path, offset, stored_bytes(dtype, elements))

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY and depth < MAX_NESTING:
            return self._array(depth + 1)
        raise damaged(self._path, f"{self._where} has the unknown value type {kind}")

    def _array(self, depth: int) -> list[Any]:
        kind = int(self._scalar(_U32))
        scalar = _SCALARS.get(kind)
        smallest = scalar.size if scalar else 8 if kind == _STRING else 12
        count = self._count(smallest, f"elements in {self._where}", MAX_ELEMENTS)
        if scalar:
            format_ = f"<{count}{scalar.format[-1]}"
            return list(struct.unpack(format_, self._take(count * scalar.size)))
        if kind == _STRING:
            return self._strings(count)
        return [self._value(kind, depth) for _ in range(count)]

    def _strings(self, count: int) -> list[str]:
        """The hot loop: a vocabulary has hundreds of thousands of strings."""
        window, at = self._window, self._within
        last = len(window)
        length_at = _U64.unpack_from
        strings = []
        try:
            for _ in range(count):
                end = at + 8
                if end <= last:
                    (length,) = length_at(window, at)
                    end += length
                if end > last:  # not all of it is in the window
                    self._within = at
                    strings.append(str(self._take(int(self._scalar(_U64))), "utf-8"))
                    window, at = self._window, self._within
                    last = len(window)
                    continue
                strings.append(str(window[at + 8 : end], "utf-8"))
                at = end
        except UnicodeDecodeError:
            raise damaged(self._path, f"{self._where} holds text that is not UTF-8") from None
        self._within = at
        return strings

    def _string(self) -> str:
        return self._strings(1)[0]

    def _scalar(self, form: struct.Struct) -> Any:
        return form.unpack(self._take(form.size))[0]

    def _count(self, smallest: int, what: str, limit: int = 2**63) -> int:
        """A count of things that take at least `smallest` bytes each."""
        count = int(self._scalar(_U64))
        if count > min(limit, (self._end - self._at) // smallest):
            raise damaged(self._path, f"the header claims {count} {what}, more than the file can hold")
        return count

    def _take(self, length: int) -> bytes:
        at = self._at
        if at + length > self._end:
            raise self._short()
        if length > WINDOW:
            taken = self._file.read(at, length)
            self._window, self._start, self._within = b"", at + length, 0
            return taken
        if self._within + length > len(self._window):
            self._window = self._file.read(at, min(WINDOW, self._end - at))
            self._start, self._within = at, 0
        taken = self._window[self._within : self._within + length]
        self._within += length
        return taken

    def _short(self) -> LoadFailed:
        if self._end < self._size:
            return damaged(self._path, f"{self._where} reaches beyond any header, byte {self._end}")
        return damaged(self._path, f"the file ends within {self._where}")
