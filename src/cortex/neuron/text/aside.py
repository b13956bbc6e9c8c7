"""Where prompts are made: at once where that is quick, else beside the event loop.

A thread costs a short prompt a good part of the time that it takes, and a long one would hold up everybody's
tokens. Knows neither templates nor tokenizers, only how large the work is and how long it took last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

T = TypeVar("T")

THREADS: Final = 4
"""They share the interpreter with the event loop, so that more would only hold that up."""
LARGE: Final = 8192
"""Characters that take milliseconds."""
SLOW_S: Final = 0.05
"""Nothing that is not large takes so long, but where a model's template is slow by itself, or means ill."""


class Aside:
    """One for the node's life. Remembers the models for which small work was slow once."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="prompt")
        self._slow: set[str] = set()

    async def run(self, model_id: str, size: int, work: Callable[[], T]) -> T:
        """What `work` gives or raises, done in a thread if `size` characters, or the model, take long.

        Cancelled, work that has not begun is not done; else its thread ends it for nobody.
        """
        if size >= LARGE or model_id in self._slow:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        began = self._clock()
        try:
            return work()
        finally:
            if self._clock() - began > SLOW_S:
                self._slow.add(model_id)
