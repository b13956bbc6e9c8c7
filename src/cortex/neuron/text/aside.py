"""Where prompts are made: at once where that is quick, else beside the event loop.

A thread costs a short prompt a good part of the time that it takes, and a long one would hold up everybody's
tokens. Knows neither templates nor tokenizers, only how large the work is and how long it took last.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

THREADS: Final = 4
"""They share the interpreter with the event loop, so that more would only hold that up."""
OF_ONE: Final = 2
"""Threads that one model has at a time, so that a template which means ill leaves some to the others."""
QUICK: Final = 32
"""Times in a row that a slow model's work must be quick to be done at once again."""
LARGE: Final = 8192
"""Characters that take milliseconds."""
SLOW_S: Final = 0.05
"""Of a processor. Nothing that is not large takes so long, but where a model's template is slow by itself, or
means ill."""


class Aside:
    """One for the node's life. Remembers the models whose small work is slow. `clock` is a thread's own."""

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prompt")
        self._places: dict[str, asyncio.Semaphore] = {}
        self._slow: dict[str, int] = {}
        """How many times more a model's work has to be quick."""

    async def run(self, model_id: str, size: int, work: Callable[[], T]) -> T:
        """What `work` gives or raises, done in a thread if `size` characters, or the model, take long.

        Cancelled, work that has not begun is not done; else its thread ends it for nobody.
        """
        if size < LARGE and model_id not in self._slow:
            return self._timed(model_id, size, work)
        loop = asyncio.get_running_loop()
        places = self._places.setdefault(model_id, asyncio.Semaphore(OF_ONE))
        await places.acquire()
        begun = self._threads.submit(self._timed, model_id, size, work)

        def leave(_: object) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(places.release)

        begun.add_done_callback(leave)
        return await asyncio.wrap_future(begun)

    def _timed(self, model_id: str, size: int, work: Callable[[], T]) -> T:
        began = self._clock()
        try:
            return work()
        finally:
            slow = self._clock() - began > SLOW_S
            if slow and size < LARGE:
                self._slow[model_id] = QUICK
            elif size < LARGE and (left := self._slow.pop(model_id, 0)) > 1:
                self._slow[model_id] = left - 1
