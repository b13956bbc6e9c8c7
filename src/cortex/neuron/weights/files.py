"""Opens what weights are made of: files read at a place or as read-only mappings, and JSON of sensible size.

A mapping of a file that is cut short meanwhile ends the process that looks there, so whoever must live on
reads. Knows neither formats nor fields; those are the caller's.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec

from cortex.neuron.weights.layout import damaged
from cortex.wire.errors import LoadFailed

MAX_JSON: Final = 2**26
"""Bytes; the index of the largest published model has a tenth of it."""

T = TypeVar("T")


class OpenFile:
    """A file that is read at any place, as a context manager. `size` is that at its opening.

    Raises LoadFailed: it cannot be opened, or there are no bytes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            self.size = os.fstat(self._file.fileno()).st_size
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from None
        if not self.size:
            self._file.close()
            raise damaged(path, "the file is empty")

    def read(self, at: int, length: int) -> bytes:
        """Bytes [at, at + length), which the caller has held against `size`.

        Raises LoadFailed if the file has become shorter or cannot be read any more.
        """
        try:
            found = os.pread(self._file.fileno(), length, at)
            while len(found) < length:
                more = os.pread(self._file.fileno(), length - len(found), at + len(found))
                if not more:
                    raise cut_short(self.path)
                found += more
        except OSError as error:
            raise _unreadable(self.path, error) from None
        return found

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


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


def cut_short(path: Path) -> LoadFailed:
    return damaged(path, "the file was cut short while it was in use")


def _unreadable(path: Path, error: OSError | ValueError) -> LoadFailed:
    """ValueError is what paths with a NUL in them give."""
    return LoadFailed(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.")
