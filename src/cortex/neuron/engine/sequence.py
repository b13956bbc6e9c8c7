"""One sequence in the engine: its tokens, how far it is, its slot, its chance and its times.

The scheduler owns it. Knows no torch and no other sequence.
"""

from __future__ import annotations

import random

from cortex.hookspecs import EngineTimings, Sampling
from cortex.neuron.engine.messages import Generate


class Sequence:
    """Prefill and decode are one thing: the tokens that the cache lacks are computed next.

    Times are seconds of the scheduler's clock.
    """

    def __init__(self, order: Generate, arrived: float) -> None:
        self.key = order.key
        self.request_id = order.request_id
        self.sampling: Sampling = order.sampling
        self.tokens = list(order.ids)
        self.slot: int | None = None
        self.cached = 0
        """Tokens whose keys and values the cache holds."""
        self._prompt_length = len(order.ids)
        self._chance = random.Random(order.sampling.seed)
        self._arrived = arrived
        self._started: float | None = None
        self._first_token: float | None = None

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 in decode."""
        return len(self.tokens) - self.cached

    @property
    def generated(self) -> int:
        return len(self.tokens) - self._prompt_length

    @property
    def in_decode(self) -> bool:
        return self.generated > 0

    def draw(self) -> float:
        """The sequence's next number in [0, 1): from its own seed, whatever its batch mates do."""
        return self._chance.random()

    def start(self, now: float) -> None:
        """A step with this sequence begins; the first one ends its wait."""
        if self._started is None:
            self._started = now

    def append(self, token: int, now: float) -> None:
        self.tokens.append(token)
        self.mark_sampled(now)

    def mark_sampled(self, now: float) -> None:
        """A token was sampled; the first one ends prefill."""
        if self._first_token is None:
            self._first_token = now

    def timings(self, now: float) -> EngineTimings:
        started = now if self._started is None else self._started
        first = now if self._first_token is None else self._first_token
        return EngineTimings(
            queue_ms=(started - self._arrived) * 1e3,
            prefill_ms=(first - started) * 1e3,
            decode_ms=(now - first) * 1e3,
        )
