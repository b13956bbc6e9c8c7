"""Idle timeouts: something that has begun and makes no progress for too long is ended.

One timer of the event loop serves any number of waits, so that a wait costs two assignments. Knows
nothing of sockets or HTTP; time is injected.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

Clock = Callable[[], float]
"""Monotonic seconds."""


class Handle(Protocol):
    def cancel(self) -> None: ...


CallLater = Callable[[float, Callable[[], None]], Handle]
"""Runs a callback once, after so many seconds, unless the handle is cancelled."""


def loop_call_later(delay: float, callback: Callable[[], None]) -> Handle:
    return asyncio.get_running_loop().call_later(delay, callback)


class IdleTimer:
    """Calls `expire` once `limit` seconds have passed since `begin` without an `end` or a new `begin`."""

    def __init__(self, limit: float, expire: Callable[[], None], clock: Clock, call_later: CallLater) -> None:
        self.limit = limit
        self._expire = expire
        self._clock = clock
        self._call_later = call_later
        self._since: float | None = None
        self._handle: Handle | None = None

    def begin(self) -> None:
        """Something is waited for from now on."""
        self._since = self._clock()
        if self._handle is None:
            self._arm(self.limit)

    def end(self) -> None:
        """It came. The loop's timer runs on, and serves the next wait."""
        self._since = None

    def close(self) -> None:
        """Nothing will be waited for any more."""
        self._since = None
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def _arm(self, delay: float) -> None:
        self._handle = self._call_later(delay, self._check)

    def _check(self) -> None:
        self._handle = None
        if self._since is None:
            return
        left = self._since + self.limit - self._clock()
        if left > 0:
            self._arm(left)
        else:
            self._since = None
            self._expire()
