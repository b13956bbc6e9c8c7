"""What the benchmark asks of every engine: load, generate, close; and the clock that all are read by.

A generation marks the moment of each token on a trace that others may read while it grows. So every
engine is timed alike, by the wall clock of the process that asks it.
"""

from __future__ import annotations

import itertools
from time import perf_counter
from typing import Any, Final, Protocol

from .models import Prompt

THREADS: Final = 2
"""Cores that every engine may use."""
STREAMS: Final = 8
"""Sequences that every engine must be able to run at a time."""
CONTEXT: Final = 1024
"""Tokens that each of them may hold, where an engine sets memory aside for it."""


class Trace:
    """When each token of one generation came, in seconds of `perf_counter`."""

    def __init__(self) -> None:
        self.started = perf_counter()
        self.times: list[float] = []
        self.ids: list[int] = []
        """The tokens themselves, where the engine gives ids."""
        self.prompt_tokens: int | None = None
        """Set where the engine has read another number of tokens out of the text than were in the ids."""
        self.generated: int | None = None
        """Set where the engine holds tokens back until their characters are complete, and so tells fewer
        moments than tokens."""
        self.own: dict[str, float] = {}
        """What the engine itself says of its speed, as a cross-check."""

    def mark(self, tokens: int = 1) -> None:
        now = perf_counter()
        self.times += [now] * tokens

    @property
    def count(self) -> int:
        return len(self.times) if self.generated is None else self.generated

    @property
    def first(self) -> float:
        """Seconds from the request to the first token."""
        return self.times[0] - self.started

    @property
    def rate(self) -> float:
        """Tokens a second after the first one."""
        return (self.count - 1) / (self.times[-1] - self.times[0])

    def gaps(self) -> list[float]:
        """Between two moments at which tokens came; those that came together are one moment."""
        moments = sorted(set(self.times))
        return [after - before for before, after in itertools.pairwise(moments)]


class Adapter(Protocol):
    """One engine with one model. All greedy, no end before `tokens`, nothing reused between prompts
    that have nothing in common."""

    async def load(self, path: str) -> None: ...

    async def generate(self, prompt: Prompt, tokens: int, trace: Trace) -> None:
        """Returns when all tokens are on the trace. Cancelling it may, but need not, stop the engine."""

    async def close(self) -> None: ...

    def facts(self) -> dict[str, Any]:
        """What a reader of the figures should know, such as the version."""
