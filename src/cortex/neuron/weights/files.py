"""Opens what weights are made of: files as read-only mappings, and JSON up to a size that makes sense.

Knows neither formats nor fields; those are the caller's.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from cortex.neuron.weights.layout import damaged
from cortex.wire.errors import LoadFailed

MAX_JSON: Final = 2**26
"""Bytes; the index of the largest published model has a tenth of it."""

T = TypeVar("T")


def map_file(path: Path) -> mmap.mmap:
    """A file's bytes. Raises LoadFailed: it cannot be read, or there are none."""
    try:
        with path.open("rb") as file:
            if not path.stat().st_size:
                raise damaged(path, "the file is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None


def read_json(path: Path, kind: type[T], what: str) -> T:
    """A file as `kind`. Raises LoadFailed, which calls it `what`."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON:
            raise damaged(path, f"{what} has {size} bytes, more than any can have")
        text = path.read_bytes()
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from None
    return decode_json(text, kind, path, what)


def decode_json(text: bytes | memoryview, kind: type[T], path: Path, what: str) -> T:
    """As `read_json`, from bytes of the file."""
    try:
        return msgspec.json.decode(text, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise damaged(path, f"{what} is not the JSON that it should be ({error})") from None


def _unreadable(path: Path, error: OSError | ValueError) -> LoadFailed:
    """ValueError is what paths with a NUL in them give."""
    return LoadFailed(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.")
