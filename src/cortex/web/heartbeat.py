"""Signs of life on a stream that has nothing to say. Knows neither the stream nor what a sign looks like."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cortex.web.idle import CallLater, Clock, IdleTimer


class Heartbeat:
    """Runs `beat` whenever `every` seconds pass between `begin` and `end`. Costs nothing otherwise."""

    def __init__(
        self, every: float, beat: Callable[[], Awaitable[None]], clock: Clock, call_later: CallLater
    ) -> None:
        self._beat = beat
        self._idle = IdleTimer(every, self._due, clock, call_later)
        self._beating: asyncio.Task[None] | None = None

    def begin(self) -> None:
        self._idle.begin()

    async def end(self) -> None:
        """No beat is under way when this returns. Raises what the last one raised."""
        self._idle.end()
        if self._beating is not None:
            beating, self._beating = self._beating, None
            await beating

    async def close(self) -> None:
        self._idle.close()
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.gather(self._beating, return_exceptions=True)

    def _due(self) -> None:
        self._beating = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        await self._beat()
        if self._beating is asyncio.current_task():
            # Otherwise `end` waits for this beat, and the silence is over.
            self._idle.begin()
