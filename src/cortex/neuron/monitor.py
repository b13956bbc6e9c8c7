"""Keeps recent readings of the devices, so that nobody who asks has to wait for a driver."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from cortex.neuron.hardware import Reading

_log: Final = logging.getLogger("cortex.neuron.monitor")
EVERY_S: Final = 2.0


class Monitor:
    """`readings` are by uuid; while a driver hangs they grow old, and everything else goes on."""

    def __init__(
        self,
        read: Callable[[], Mapping[str, Reading]],
        *,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._read = read
        self._sleep = sleep
        self.readings: Mapping[str, Reading] = {}

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                self.readings = await asyncio.to_thread(self._read)
            except Exception:
                _log.exception("the devices cannot be read")
            await self._sleep(EVERY_S)
