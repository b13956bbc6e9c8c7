"""What one rendering of a chat template has done so far, and the bounds that end it.

Every bound ends in a SecurityError. Knows the values of templates, but not jinja's way to them.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable
from typing import Any, Final

from jinja2.exceptions import SecurityError

MAX_TEXT: Final = 32 * 2**20
"""Characters of the rendered prompt, and of any text on the way to it; so much a list may print as, too."""
MAX_MADE: Final = 8 * MAX_TEXT
"""Characters of all texts on the way together, and with them what a rendering holds in memory."""
MAX_STEPS: Final = 2_000_000
"""Rounds of loops, calls and filters in one rendering."""
MAX_SECONDS: Final = 5.0
"""Seen at every step. Between two steps stand single operations, each on texts within MAX_TEXT."""
_MAX_DEPTH: Final = 200
"""Of lists in lists. Python hashes nested tuples by recursion that nothing stops before the stack ends."""
_MAX_INTEGER_BITS: Final = 4096
_OVERHEAD: Final = 64
"""What a value takes besides its characters, so that very many small ones count as well."""
ITEM: Final = 8
"""What a list holds for one item. A dict or a set holds more."""
_HASHED_ITEM: Final = 64
_NESTED: Final = (list, tuple, dict, set)
_VIEWS: Final[tuple[Any, ...]] = (type({}.keys()), type({}.values()), type({}.items()))


class Account:
    """The account of one rendering.

    The values of templates do not change once they are made, so the size of a list is found out once.
    Without that a list that holds one list twice, and so on, would be cheap to make and endless to print,
    compare or hash.
    """

    def __init__(self) -> None:
        self._deadline = time.monotonic() + MAX_SECONDS
        self._steps = 0
        self._made = 0
        self._measured: dict[int, tuple[int, int, Any]] = {}

    def step(self) -> None:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it takes more than {MAX_SECONDS} seconds")

    def take(self, size: int) -> None:
        """Counts a value of so many characters."""
        bound(size)
        self._made += size + _OVERHEAD
        if self._made > MAX_MADE:
            raise SecurityError(f"it makes more than {MAX_MADE} characters in all")

    def made(self, value: Any) -> None:
        """Counts what an operation has made."""
        if isinstance(value, str):
            self.take(len(value))
        elif isinstance(value, _NESTED):
            self.take(len(value) * (ITEM if isinstance(value, list | tuple) else _HASHED_ITEM))
            bound(self.weigh(value))
        elif isinstance(value, int):
            bound_integer(value.bit_length())

    def joined(self, left: Any, right: Any, value: Any) -> None:
        """Counts `left + right`, without another look at all the items of a list that grows."""
        if isinstance(value, list | tuple):
            (weight, depth), (more, deeper) = self._measure(left), self._measure(right)
            self._measured[id(value)] = weight + more, max(depth, deeper), value
        self.made(value)

    def weigh(self, value: Any) -> int:
        """About the characters that `value` prints as, and at least ITEM for each item in it."""
        return self._measure(value)[0]

    def depth(self, value: Any) -> int:
        return self._measure(value)[1]

    def _measure(self, value: Any) -> tuple[int, int]:
        if isinstance(value, str):
            return len(value) + ITEM, 0
        if isinstance(value, int):
            return value.bit_length() // 3 + ITEM, 0
        if not isinstance(value, _NESTED + _VIEWS):
            return len(repr(value)) + ITEM, 0
        known = self._measured.get(id(value))
        if known is None:  # the value is kept as well: another one could get its id
            known = self._measured[id(value)] = *self._measure_items(value), value
        return known[:2]

    def _measure_items(self, value: Any) -> tuple[int, int]:
        items: Iterable[Any] = itertools.chain(value, value.values()) if isinstance(value, dict) else value
        weight, depth = ITEM, 1
        for item in items:
            if type(item) is str:
                weight += len(item) + ITEM
            else:
                inner, below = self._measure(item)
                weight += inner
                depth = max(depth, below + 1)
        if depth > _MAX_DEPTH:
            raise SecurityError("it nests lists too deeply")
        return weight, depth


def bound(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes more than {MAX_TEXT} characters")


def bound_integer(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise SecurityError("it computes with huge integers")
