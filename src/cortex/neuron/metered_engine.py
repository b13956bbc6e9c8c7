"""A TokenEngine that counts and times the tokens of another one for a single request."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from cortex.hookspecs import Sampling, TokenBatch, TokenEngine


class Meter(Protocol):
    def first_token(self, model: str, seconds: float, prompt_tokens: int) -> None: ...

    def generated(self, model: str, tokens: int, seconds: float) -> None: ...


class MeteredEngine:
    """`started` is when the request arrived, on `clock`.

    A request may generate several sequences from its prompt: the prompt and the time to the first token
    count once, the tokens and the gaps between them for each sequence.
    """

    def __init__(
        self, engine: TokenEngine, model_id: str, meter: Meter, *, started: float, clock: Callable[[], float]
    ) -> None:
        self._engine = engine
        self._model_id = model_id
        self._meter = meter
        self._started = started
        self._clock = clock
        self._begun = False

    async def generate(
        self, request_id: str, ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[TokenBatch, None]:
        tokens = 0
        first = last = 0.0
        source = self._engine.generate(request_id, ids, sampling)
        try:
            async for batch in source:
                last = self._clock()
                first = first or last
                if not self._begun:
                    self._begun = True
                    self._meter.first_token(self._model_id, first - self._started, len(ids))
                tokens += len(batch.ids)
                yield batch
        finally:
            if first:
                self._meter.generated(self._model_id, tokens, last - first)
            with contextlib.suppress(AttributeError):
                await source.aclose()  # type: ignore[attr-defined]
