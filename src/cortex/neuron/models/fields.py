"""Typed look-ups in a model's configuration, with errors that name file and key. Knows no format.

No number gets out of here that is not finite or that no model comes near, for sizes are looped over and
multiplied before anybody looks for the weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from cortex.wire.errors import LoadFailed

MOST: Final = 2**31 - 1
"""Of integers that have no tighter bound; whatever they measure, no model comes near it."""
MOST_LAYERS: Final = 4096
"""Thirty times the deepest published model's; every layer is built before its weights are looked for."""
MOST_PARTS: Final = 2**16
"""Heads of a layer, or its experts: a hundred times those of the widest published model."""
_MOST_NUMBER: Final = 2.0**53


class Fields:
    """`values` under keys that begin with `prefix`; `where` says for an error what they are."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str, where: str) -> None:
        self._path = path
        self._values = values
        self._prefix = prefix
        self._where = where

    def integer(self, key: str, default: int | None = None, *, least: int = 0, most: int = MOST) -> int:
        """Raises LoadFailed if the key is not there, without a default, or no such integer; so do the
        others."""
        value = int(self._number(key, int, default))
        self._check_range(key, value, least, most)
        return value

    def size(self, key: str, default: int | None = None, most: int = MOST) -> int:
        """An integer of at least 1."""
        return self.integer(key, default, least=1, most=most)

    def size_of_layers(
        self, key: str, have: Sequence[bool], default: int | None = None, most: int = MOST
    ) -> int:
        """One size for all layers, or a list of one for each, the same in all layers that `have` it. The
        others may have it too, or 0; the list may be longer than there are layers."""
        values = self.get(key)
        if not isinstance(values, list):
            return self.size(key, default, most)
        own = values[: len(have)]
        sizes: set[int] = (
            {value for value in own if value} if all(type(value) is int for value in own) else set()
        )
        if len(own) < len(have) or len(sizes) != 1 or not all(own[at] for at, has in enumerate(have) if has):
            raise LoadFailed(
                f"{self._path}: {self._prefix}{key} is {values!r:.200}, not one size that all "
                f"{sum(have)} of {len(have)} layers have which need it."
            )
        (size,) = sizes
        self._check_range(key, size, 1, most)
        return size

    def number(
        self, key: str, default: float | None = None, *, above: float = -math.inf, most: float = math.inf
    ) -> float:
        value = float(self._number(key, (int, float), default))
        if not above < value <= most:
            bound = f"more than {above:g}" if value <= above else f"at most {most:g}"
            raise LoadFailed(f"{self._path}: {self._prefix}{key} is {value}; it must be {bound}.")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """A number above 0."""
        return self.number(key, default, above=0)

    def integers(self, key: str) -> list[int]:
        """Empty if the key is not there."""
        values = self.get(key, [])
        if not isinstance(values, list) or not all(type(value) is int for value in values):
            raise LoadFailed(f"{self._path}: {self._prefix}{key} is {values!r:.200}, not a list of integers.")
        return values

    def section(self, key: str) -> dict[str, Any]:
        """Empty if the key is not there."""
        values = self.get(key, {})
        if not isinstance(values, dict):
            raise LoadFailed(f"{self._path}: {key} in {self._where} is {values!r:.200}, not an object.")
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

    def _check_range(self, key: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            bound = f"at least {least}" if value < least else f"at most {most}"
            raise LoadFailed(f"{self._path}: {self._prefix}{key} is {value}; it must be {bound}.")

    def _number(self, key: str, kind: Any, default: Any) -> Any:
        value = self.get(key, default)
        if value is None:
            raise LoadFailed(f"{self._path}: {self._where} lacks {self._prefix}{key}.")
        if isinstance(value, bool) or not isinstance(value, kind) or not abs(value) < _MOST_NUMBER:
            raise LoadFailed(f"{self._path}: {self._prefix}{key} is {value!r:.200}, which is no such number.")
        return value
