"""One reply in the making: its text, its counts and times, and the chunks that carry it.

Knows a codec and the wire's chunk; knows no engine and no request.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from cortex.hookspecs import Codec, EngineTimings, TokenBatch
from cortex.neuron.text.stop import StopStrings
from cortex.wire.chat import ChatChunk, ChunkChoice, Delta, Timings, Usage


class Reply:
    """What has been said so far: text, tokens, times, and why it ended."""

    def __init__(self, codec: Codec, stops: tuple[str, ...], timer: Callable[[], float]) -> None:
        self._text = codec.detokenizer()
        self._stops = StopStrings(stops)
        self._timer = timer
        self._prompt_tokens = 0
        self._tokens = 0
        self._began = self._first = self._last = 0.0
        self._engine_timings: EngineTimings | None = None
        self.finish: str | None = None

    def begin(self, prompt_tokens: int) -> None:
        self._prompt_tokens = prompt_tokens
        self._began = self._first = self._last = self._timer()

    def take(self, batch: TokenBatch) -> str:
        """The text that a batch adds; sets `finish` where it is the last."""
        if batch.ids:
            self._last = self._timer()
            self._first = self._first if self._tokens else self._last
            self._tokens += len(batch.ids)
        self._engine_timings = batch.timings
        text = self._stops.feed(self._text.feed(batch.ids))
        if batch.finish is not None:
            text += self._stops.feed(self._text.flush())
            text += self._stops.flush()
        self.finish = "stop" if self._stops.hit is not None else batch.finish
        return text

    def usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens,
            total_tokens=self._prompt_tokens + self._tokens,
        )

    def timings(self) -> Timings:
        """The engine's, else our own, in which waiting counts as prefill.

        The first token is prefill's, so decode is credited with the others.
        """
        spent = self._engine_timings or EngineTimings(
            prefill_ms=(self._first - self._began) * 1e3, decode_ms=(self._last - self._first) * 1e3
        )
        return Timings(
            queue_ms=spent.queue_ms,
            prefill_ms=spent.prefill_ms,
            decode_ms=spent.decode_ms,
            prompt_per_second=_rate(self._prompt_tokens, spent.prefill_ms),
            predicted_per_second=_rate(self._tokens - 1, spent.decode_ms),
        )


def _rate(count: int, milliseconds: float) -> float:
    return count / milliseconds * 1e3 if count > 0 and milliseconds > 0 else 0.0


class Chunks:
    """Makes the chunks of one reply; they share id, time and model."""

    def __init__(self, request_id: str, model_id: str, created: int) -> None:
        self._id = f"chatcmpl-{request_id or secrets.token_hex(12)}"
        self._model_id = model_id
        self._created = created
        self.started = False

    def text(self, text: str) -> ChatChunk:
        delta = Delta(content=text) if self.started else Delta(role="assistant", content=text)
        self.started = True
        return self._chunk(choices=[ChunkChoice(delta=delta)])

    def finish(self, reason: str, timings: Timings | None = None) -> ChatChunk:
        chunk = self._chunk(choices=[ChunkChoice(finish_reason=reason)])
        if timings is not None:
            chunk.timings = timings
        return chunk

    def usage(self, usage: Usage, timings: Timings) -> ChatChunk:
        return self._chunk(usage=usage, timings=timings)

    def _chunk(self, **members: Any) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model_id, **members)
