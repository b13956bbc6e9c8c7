"""One choice of a reply in the making: its text, its counts and times, and the chunks that carry it.

Knows a codec and the wire's chunk; knows no engine and no request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from cortex.hookspecs import Codec, EngineTimings, TokenBatch
from cortex.neuron.text.logprobs import PendingLogprobs
from cortex.neuron.text.stop import StopStrings
from cortex.wire.chat import (
    ChatChunk,
    ChunkChoice,
    ContentLogprob,
    Delta,
    Logprobs,
    PromptTokensDetails,
    Timings,
    Usage,
)
from cortex.wire.errors import BadRequest


class Chunks:
    """Makes the chunks of one choice. Those of all choices share id, time and model."""

    def __init__(self, reply_id: str, model_id: str, created: int, index: int = 0) -> None:
        self._id = reply_id
        self._model_id = model_id
        self._created = created
        self._index = index
        self.started = False

    def text(self, text: str, tokens: list[ContentLogprob] | None = None) -> ChatChunk:
        delta = Delta(content=text) if self.started else Delta(role="assistant", content=text)
        self.started = True
        logprobs = None if tokens is None else Logprobs(content=tokens)
        return self._chunk(choices=[ChunkChoice(index=self._index, delta=delta, logprobs=logprobs)])

    def finish(self, reason: str) -> ChatChunk:
        return self._chunk(choices=[ChunkChoice(index=self._index, finish_reason=reason)])

    def usage(self, usage: Usage, timings: Timings) -> ChatChunk:
        return self._chunk(usage=usage, timings=timings)

    def _chunk(self, **members: Any) -> ChatChunk:
        return ChatChunk(id=self._id, created=self._created, model=self._model_id, **members)


class Reply:
    """What one choice has said so far: text, tokens, times, and why it ended."""

    def __init__(
        self,
        chunks: Chunks,
        codec: Codec,
        stops: tuple[str, ...],
        timer: Callable[[], float],
        *,
        prompt_tokens: int,
        logprobs: bool = False,
    ) -> None:
        self._chunks = chunks
        self._text = codec.detokenizer()
        self._stops = StopStrings(stops)
        self._may_stop = bool(stops)
        self._timer = timer
        self._pending = PendingLogprobs(codec) if logprobs else None
        self._began = self._first = self._last = timer()
        self._engine_timings: EngineTimings | None = None
        self.prompt_tokens = prompt_tokens
        self.cached_tokens: int | None = None
        """Those of the prompt that the engine did not compute; None where it did not say."""
        self.tokens = 0
        self.finish: str | None = None

    def take(self, batch: TokenBatch) -> ChatChunk | None:
        """The chunk to send for a batch, None if nothing of it can be shown yet; the first always shows.

        Sets `finish` where the batch is the last. Raises BadRequest if it brings no log probabilities
        although they were asked for.
        """
        if batch.ids:
            self._last = self._timer()
            self._first = self._first if self.tokens else self._last
        if batch.cached_tokens is not None:
            self.cached_tokens = batch.cached_tokens
        self._engine_timings = batch.timings
        text = self._decode(batch)
        if batch.finish is not None:
            text += self._stops.feed(self._text.flush())
            text += self._stops.flush()
        self.finish = "stop" if self._stops.hit is not None else batch.finish
        tokens = None if self._pending is None else self._shown_by(text, self._pending)
        return self._chunks.text(text, tokens) if text or tokens or not self._chunks.started else None

    def _decode(self, batch: TokenBatch) -> str:
        """The text of a batch that stop strings let through. What was computed behind one does not count."""
        pending, told = self._pending, batch.logprobs or []
        if pending is not None and len(told) != len(batch.ids):
            raise BadRequest(
                "The engine of this model gives no log probabilities; leave logprobs out.", param="logprobs"
            )
        if pending is None and not self._may_stop:
            self.tokens += len(batch.ids)
            return self._text.feed(batch.ids)
        text = ""
        for at, token in enumerate(batch.ids):
            if self._stops.hit is not None:
                break
            piece = self._text.feed([token])
            if pending is not None:
                pending.add(told[at], piece)
            self.tokens += 1
            text += self._stops.feed(piece)
        return text

    def last_chunk(self) -> ChatChunk:
        return self._chunks.finish(str(self.finish))

    def usage_chunk(self, usage: Usage) -> ChatChunk:
        return self._chunks.usage(usage, self.timings())

    def timings(self) -> Timings:
        """The engine's, else our own, in which waiting counts as prefill.

        The first token is prefill's, so decode is credited with the others; a cached prompt token is
        nobody's work.
        """
        spent = self._engine_timings or EngineTimings(
            prefill_ms=(self._first - self._began) * 1e3, decode_ms=(self._last - self._first) * 1e3
        )
        return Timings(
            queue_ms=spent.queue_ms,
            prefill_ms=spent.prefill_ms,
            decode_ms=spent.decode_ms,
            prompt_per_second=_rate(self.prompt_tokens - (self.cached_tokens or 0), spent.prefill_ms),
            predicted_per_second=_rate(self.tokens - 1, spent.decode_ms),
        )

    def _shown_by(self, text: str, pending: PendingLogprobs) -> list[ContentLogprob]:
        """The tokens that go out with `text`."""
        tokens = pending.shown_by(text)
        if self.finish is not None and self._stops.hit is None:
            tokens += pending.rest()
        return tokens


def usage(replies: Sequence[Reply]) -> Usage:
    """Of all choices together. They share the prompt, so it counts once, and as cached what was for all."""
    prompt = replies[0].prompt_tokens
    generated = sum(reply.tokens for reply in replies)
    found = Usage(prompt_tokens=prompt, completion_tokens=generated, total_tokens=prompt + generated)
    cached = [reply.cached_tokens for reply in replies if reply.cached_tokens is not None]
    if cached:
        found.prompt_tokens_details = PromptTokensDetails(cached_tokens=min(cached))
    return found


def _rate(count: int, milliseconds: float) -> float:
    return count / milliseconds * 1e3 if count > 0 and milliseconds > 0 else 0.0
