"""A clock that stands still until a test moves it: time, timers and sleeping."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class ManualClock:
    """Stands in for `time.monotonic` (call it), `loop.call_later` and `asyncio.sleep`.

    `advance` runs what falls due, in the order of its time, and lets the tasks that it woke run.
    """

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now
        self._order = itertools.count()
        self._timers: list[tuple[float, int, ManualTimer]] = []

    def __call__(self) -> float:
        return self.now

    @property
    def pending(self) -> int:
        """Timers that wait for their time."""
        return sum(not timer.cancelled for _, _, timer in self._timers)

    def call_later(self, delay: float, callback: Callable[[], None]) -> ManualTimer:
        timer = ManualTimer(callback)
        heapq.heappush(self._timers, (self.now + max(0.0, delay), next(self._order), timer))
        return timer

    async def sleep(self, delay: float) -> None:
        woken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        timer = self.call_later(delay, lambda: None if woken.done() else woken.set_result(None))
        try:
            await woken
        finally:
            timer.cancel()

    async def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        until = self.now + seconds
        await settle()
        while self._timers and self._timers[0][0] <= until:
            due, _, timer = heapq.heappop(self._timers)
            if not timer.cancelled:
                self.now = max(self.now, due)
                timer.callback()
                await settle()
        self.now = until


class ManualTimer:
    """What `ManualClock.call_later` gives."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


async def settle(rounds: int = 20) -> None:
    """Let every task that can run do so, as far as `rounds` turns of the loop carry it."""
    for _ in range(rounds):
        await asyncio.sleep(0)
