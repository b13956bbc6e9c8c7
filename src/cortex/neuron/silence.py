"""Notices that what is due does not come.

Time is counted in ticks that pass here, not measured: where this process is stopped and goes on later, those
it watches were most likely stopped as well. Knows neither ranks nor what they say.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

TICKS: Final = 10
"""Into which the time is divided."""

Sleep = Callable[[float], Awaitable[object]]


async def silence(
    seconds: float,
    heard: Callable[[], object],
    due: Callable[[], bool] = lambda: True,
    *,
    sleep: Sleep = asyncio.sleep,
) -> None:
    """Returns when `heard()` has stayed the same for `seconds` in which something was due all the time."""
    silent, last = 0, heard()
    while silent < TICKS:
        was_due = due()
        await sleep(seconds / TICKS)
        now = heard()
        silent = silent + 1 if was_due and due() and now == last else 0
        last = now
