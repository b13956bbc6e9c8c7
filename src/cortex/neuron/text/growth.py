"""How large the results of operations will be that make much out of little, before they are made.

Each function here has the parameters of the filter or method it speaks for, after the account of the
rendering. Where an operation is slow rather than large, the answer is a size that takes as long.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, Final

from jinja2.exceptions import SecurityError

from cortex.neuron.text.account import ITEM, Account

_FIELD: Final = re.compile(r"%%|%(?:\([^()]*\))?(\()?[#0 +-]*(\*|\d*)(?:\.(\*|\d*))?")
_FAST_STEPS: Final = 128
"""Single comparisons of characters that take about as long as making one."""


def percent(account: Account, text: str, values: Any) -> int:
    """`text % values`"""
    fields, width = 0, 0
    for field in _FIELD.finditer(text):
        nested, *sizes = field.groups()
        if nested or "*" in sizes:
            raise SecurityError("it formats to fields that cannot be measured")
        fields += 1
        width += sum(int(size) for size in sizes if size)
    return len(text) + width + fields * account.weigh(values)


def format_spec(spec: str) -> int:
    """`format(value, spec)`"""
    return sum(map(int, re.findall(r"\d+", spec)))


def _format(account: Account, text: Any, *args: Any, **named: Any) -> int:
    return percent(account, str(text), named or args)


def _padded(account: Account, text: Any, width: int = 0, fill: str = " ") -> int:
    return width


def _tabs_expanded(account: Account, text: str, tabsize: int = 8) -> int:
    return len(text) + text.count("\t") * tabsize


def _replaced(account: Account, text: Any, old: Any, new: Any, count: int | None = None) -> int:
    text, old, new = str(text), str(old), str(new)
    if len(new) <= len(old):
        return len(text)
    times: int = text.count(old)
    return len(text) + len(new) * (times if count is None or count < 0 else min(times, count))


def _joined(account: Account, separator: str, items: Iterable[Any]) -> int:
    if isinstance(items, str):
        return scattered(items) + len(separator) * len(items)
    sizes = [len(item) for item in items if isinstance(item, str)]
    return sum(sizes) + len(separator) * len(sizes)


def _split(account: Account, text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    return ITEM * text.count(sep) if sep else scattered(text)


def _split_from_right(account: Account, text: str, sep: str | None = None, maxsplit: int = -1) -> int:
    return max(_split(account, text, sep), _searched(account, text, sep))


def scattered(value: Any) -> int:
    """`list(value)`: a text falls into objects, one for each of its characters."""
    return ITEM * len(value) if isinstance(value, str) else 0


def _scattered(account: Account, value: Any, *args: Any, **named: Any) -> int:
    return scattered(value)


def _indented(
    account: Account, text: Any, width: int | str = 4, first: bool = False, blank: bool = False
) -> int:
    each = len(width) if isinstance(width, str) else width
    return len(text) + (len(text.splitlines()) + 1) * each


def _filled(account: Account, items: Any, number: int, fill_with: Any = None) -> int:
    return scattered(items) + number * account.weigh(fill_with)


def _as_json(
    account: Account,
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> int:
    each = sum(map(len, separators or ()))
    if indent is not None:
        each += account.depth(value) * (len(indent) if isinstance(indent, str) else indent)
    weight = account.weigh(value)
    return weight + weight // ITEM * each


def _searched(account: Account, text: Any, *args: Any, **named: Any) -> int:
    """Every character of the text may be compared with every one of what is looked for."""
    sought = max((len(value) for value in (*args, *named.values()) if isinstance(value, str)), default=0)
    return account.weigh(text) * sought // _FAST_STEPS if sought else 0


def _coded(account: Account, value: Any, autospace: bool = True) -> int:
    """One character becomes at most four bytes of three characters each."""
    return 12 * account.weigh(value)


def _squared(account: Account, text: Any, *args: Any, **named: Any) -> int:
    return sum(map(account.weigh, (text, *args, *named.values()))) ** 2


def _power_of_ten(account: Account, value: Any, precision: int = 0, method: str = "common") -> int:
    return precision**2


Growth = Callable[..., int]

METHODS: Final[dict[str, Growth]] = {
    "center": _padded,
    "ljust": _padded,
    "rjust": _padded,
    "zfill": _padded,
    "expandtabs": _tabs_expanded,
    "replace": _replaced,
    "join": _joined,
    "split": _split,
    "rsplit": _split_from_right,
    "splitlines": _scattered,
    **dict.fromkeys(["strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition"], _searched),
}
"""Of texts."""
FILTERS: Final[dict[str, Growth]] = {
    "batch": _filled,
    "center": _padded,
    "format": _format,
    "indent": _indented,
    "pprint": _squared,
    "replace": _replaced,
    "round": _power_of_ten,
    "slice": _filled,
    "tojson": _as_json,
    "trim": _searched,
    "urlize": _squared,
    "wordwrap": _squared,
    **dict.fromkeys(["e", "escape", "forceescape", "urlencode", "xmlattr"], _coded),
    **dict.fromkeys(["groupby", "join", "list", "map", "max", "min", "reject", "rejectattr"], _scattered),
    **dict.fromkeys(["select", "selectattr", "sort", "title", "unique", "wordcount"], _scattered),
}
