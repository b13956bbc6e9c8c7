"""Typed look-ups in a model's configuration, with errors that name file and key. Knows no format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cortex.wire.errors import LoadFailed

MOST_LAYERS: Final = 4096
"""Thirty times the deepest published model's; every layer is built before its weights are looked for."""
MOST: Final = 2**53
"""No size of a model comes near it, and every number below it is exact as an integer and as a float."""


class Fields:
    """`values` under keys that begin with `prefix`; `where` says for an error what they are."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str, where: str) -> None:
        self._path = path
        self._values = values
        self._prefix = prefix
        self._where = where

    def integer(self, key: str, default: int | None = None) -> int:
        """Raises LoadFailed if the key is not there, without a default, or no integer; so do the others."""
        return int(self._number(key, int, default))

    def layers(self, key: str) -> int:
        """Of a model; raises LoadFailed too if they are more than MOST_LAYERS."""
        count = self.integer(key)
        if count > MOST_LAYERS:
            raise LoadFailed(f"{self._path}: {count} layers are more than {MOST_LAYERS}.")
        return count

    def number(self, key: str, default: float | None = None) -> float:
        return float(self._number(key, (int, float), default))

    def integers(self, key: str) -> list[int]:
        """Empty if the key is not there."""
        values = self.get(key, [])
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise LoadFailed(f"{self._path}: {self._prefix}{key} is {values!r}, not a list of integers.")
        return values

    def section(self, key: str) -> dict[str, Any]:
        """Empty if the key is not there."""
        values = self.get(key, {})
        if not isinstance(values, dict):
            raise LoadFailed(f"{self._path}: {key} in {self._where} is {values!r}, not an object.")
        return values

    def inner(self, values: Mapping[str, Any], where: str) -> Fields:
        """The same of an object inside the configuration."""
        return Fields(self._path, values, "", where)

    def flag(self, key: str, default: bool = False) -> bool:
        return bool(self.get(key, default))

    def __contains__(self, key: str) -> bool:
        return self._values.get(self._prefix + key) is not None

    def get(self, key: str, default: Any = None) -> Any:
        value = self._values.get(self._prefix + key)
        return default if value is None else value

    def refuse(self, what: str) -> LoadFailed:
        return LoadFailed(f"{self._path}: {what} is not supported.")

    def _number(self, key: str, kind: Any, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise LoadFailed(f"{self._path}: {self._where} lacks {self._prefix}{key}.")
        if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) < MOST:
            raise LoadFailed(f"{self._path}: {self._prefix}{key} is {value!r}, which is no such number.")
        return value
