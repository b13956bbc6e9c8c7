"""An engine that runs no model: it replays what the test wrote, when the test says so.

A TokenEngine, a Codec over bytes and an EngineFactory. Nothing here sleeps: time passes only in the
hooks that a test sets. Needs an event loop only while it runs.
"""

from __future__ import annotations

import asyncio
import codecs
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any, Final, Literal

from cortex import hookimpl
from cortex.hookspecs import (
    Codec,
    Detokenizer,
    EngineFactory,
    EngineStep,
    EngineTimings,
    LoadedModel,
    LoadOrder,
    LoadPlan,
    Sampling,
    SamplingDefaults,
    TokenBatch,
    TokenLogprobs,
)
from cortex.wire.errors import CortexError, Internal, LoadFailed
from cortex.wire.node import Limit, Progress

TURN_START: Final = 256
TURN_END: Final = 257
_END: Final = -1
_SPECIAL: Final = {"<|im_start|>": TURN_START, "<|im_end|>": TURN_END}
_NAMES: Final = {id: text.encode() for text, id in _SPECIAL.items()}
_CUTS: Final = re.compile("(" + "|".join(map(re.escape, _SPECIAL)) + ")")

Script = Callable[[Sequence[int], Sampling], Iterable[Sequence[int]]]
"""Prompt ids and sampling in; out come the ids of each step. A stop id among them ends the reply."""


class ByteCodec:
    """One id per byte of UTF-8, and two special ids around each turn of a conversation."""

    stop_ids: tuple[int, ...] = (TURN_END,)

    def __init__(self, defaults: SamplingDefaults | None = None) -> None:
        self.defaults = defaults or SamplingDefaults()

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        turns = [f"<|im_start|>{turn['role']}\n{_text(turn['content'])}<|im_end|>\n" for turn in messages]
        return "".join(turns) + ("<|im_start|>assistant\n" if variables.get("add_generation_prompt") else "")

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in _CUTS.split(text):
            ids.extend([_SPECIAL[piece]] if piece in _SPECIAL else piece.encode())
        return ids

    def token_bytes(self, id: int) -> bytes:
        return bytes([id]) if 0 <= id < TURN_START else _NAMES.get(id, b"")

    def detokenizer(self) -> Detokenizer:
        return _ByteDetokenizer()


class _ByteDetokenizer:
    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        return self._decoder.decode(bytes(id for id in ids if id < TURN_START))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


def _text(content: Any) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


class ScriptedEngine:
    """Replays `reply`: a text (one id a step), or a Script. Everything a test may steer or see is here."""

    def __init__(self, reply: str | Script = "Hello there.") -> None:
        self.reply = reply
        self.before_step: Callable[[str, int], Awaitable[object]] | None = None
        """Awaited before each step with the request id and the step's number; step 0 is prefill."""
        self.timings = EngineTimings(queue_ms=1.0, prefill_ms=10.0, decode_ms=20.0)
        """What the last batch of every reply reports."""
        self.cached_tokens: int | None = None
        """What the first batch of every reply reports."""
        self.prompts: list[tuple[str, list[int], Sampling]] = []
        """Every sequence that was started, in order."""
        self.running: list[str] = []
        self.waiting: list[str] = []
        """Those of the running ones that a hook holds back."""
        self.finished: list[str] = []
        self.cancelled: list[str] = []
        self.steps = 0
        """Steps made, of all sequences together."""
        self.death: str | None = None
        self._changed = asyncio.Event()
        self._died = asyncio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for something about this engine: `await engine.until(lambda: engine.cancelled)`."""
        while not condition():
            await self._changed.wait()

    def kill(self, reason: str) -> None:
        """The engine ends by itself, as after a crash: its sequences fail with Internal."""
        self.death = self.death or reason
        self._died.set()
        self._change()

    async def died(self) -> str:
        await self._died.wait()
        return str(self.death)

    async def generate(
        self, request_id: str, ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[TokenBatch, None]:
        self.prompts.append((request_id, list(ids), sampling))
        self.running.append(request_id)
        self._change()
        outcome = self.cancelled
        try:
            left = sampling.max_tokens
            for number, step in enumerate(self._steps(ids, sampling)):
                await self._hold(request_id, number)
                given, finish = _cut(step, sampling.stop_ids, left)
                left -= len(given)
                self.steps += 1
                if finish is not None:
                    outcome = self.finished
                yield TokenBatch(
                    ids=given,
                    finish=finish,
                    timings=None if finish is None else self.timings,
                    cached_tokens=self.cached_tokens if number == 0 else None,
                    logprobs=_logprobs(given, sampling.logprobs),
                )
                if finish is not None:
                    return
        except CortexError:
            outcome = []
            raise
        finally:
            self.running.remove(request_id)
            outcome.append(request_id)
            self._change()

    def _steps(self, ids: Sequence[int], sampling: Sampling) -> Iterable[Sequence[int]]:
        if isinstance(self.reply, str):
            yield from ([byte] for byte in self.reply.encode())
        else:
            yield from self.reply(ids, sampling)
        yield [_END]

    async def _hold(self, request_id: str, step: int) -> None:
        if self.death is None and self.before_step is not None:
            held = asyncio.ensure_future(self.before_step(request_id, step))
            death = asyncio.ensure_future(self._died.wait())
            self.waiting.append(request_id)
            self._change()
            try:
                await asyncio.wait({held, death}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self.waiting.remove(request_id)
                death.cancel()
                held.cancel()
            if held.done() and not held.cancelled():
                held.result()
        if self.death is not None:
            raise Internal(f"The engine of this model ended: {self.death}. Send the request again.")

    def _change(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


def _cut(
    step: Sequence[int], stop_ids: Sequence[int], left: int
) -> tuple[list[int], Literal["stop", "length"] | None]:
    """The ids of a step that count, and why the sequence ends with them, if it does."""
    ends = {*stop_ids, _END}
    for i, id in enumerate(step[:left]):
        if id in ends:
            return list(step[:i]), "stop"
    return list(step[:left]), "length" if len(step) >= left else None


def _logprobs(ids: Sequence[int], likeliest: int | None) -> list[TokenLogprobs] | None:
    """Each token had -0.5, and the ids after it -1.5, -2.5 and so on."""
    if likeliest is None:
        return None
    return [TokenLogprobs(id, -0.5, [(id + i, -0.5 - i) for i in range(likeliest)]) for id in ids]


class ScriptedModel:
    """A loaded model of the ScriptedFactory."""

    def __init__(self, plan: LoadPlan, engine: ScriptedEngine, codec: Codec) -> None:
        self.plan = plan
        self.engine = engine
        self.codec = codec
        self.closed = False
        self.threads = plan.order.threads
        self._watchers: list[Callable[[EngineStep], None]] = []

    def watch(self, seen: Callable[[EngineStep], None]) -> None:
        self._watchers.append(seen)

    def report_step(self, step: EngineStep) -> None:
        """Tell those who watch of a step, as an engine that makes some would."""
        for seen in self._watchers:
            seen(step)

    def set_threads(self, count: int) -> None:
        self.threads = count

    async def died(self) -> str:
        return await self.engine.died()

    async def close(self) -> None:
        self.closed = True
        self.engine.kill("it was unloaded")


class ScriptedFactory:
    """The engine "scripted". An instance is a plugin too, which registers itself."""

    name = "scripted"

    def __init__(self, make_engine: Callable[[LoadOrder], ScriptedEngine] | None = None) -> None:
        self.make_engine = make_engine or (lambda order: ScriptedEngine())
        self.codec: Codec = ByteCodec()
        self.bytes_per_device = 64 * 2**20
        """What a load takes where the order names no budget."""
        self.limit = Limit(context=4096, input=4096, output=4096)
        self.before_load: Callable[[LoadPlan], Awaitable[object]] | None = None
        """Awaited in the middle of every load."""
        self.refusal: CortexError | None = None
        """Where set, loads fail with it."""
        self.started = self.stopped = False
        self.loading: list[str] = []
        self.cancelled_loads: list[str] = []
        self.models: list[ScriptedModel] = []
        """Every model ever loaded, closed ones included."""

    @property
    def live(self) -> list[ScriptedModel]:
        return [model for model in self.models if not model.closed]

    @hookimpl
    def cortex_register_engines(self, register: Callable[[EngineFactory], None]) -> None:
        register(self)

    def plan(self, order: LoadOrder) -> LoadPlan:
        if not order.devices:
            raise LoadFailed(f"No device was named for {order.model_id}.")
        size = self.bytes_per_device if order.memory_bytes is None else order.memory_bytes
        return LoadPlan(order=order, bytes_per_device=dict.fromkeys(order.devices, size), limit=self.limit)

    async def load(self, plan: LoadPlan, report: Callable[[Progress], None]) -> LoadedModel:
        model_id = plan.order.model_id
        total = sum(plan.bytes_per_device.values())
        self.loading.append(model_id)
        try:
            report(Progress(phase="weights", done=0, total=total))
            if self.before_load is not None:
                await self.before_load(plan)
            if self.refusal is not None:
                raise self.refusal
            report(Progress(phase="weights", done=total, total=total))
        except asyncio.CancelledError:
            self.cancelled_loads.append(model_id)
            raise
        finally:
            self.loading.remove(model_id)
        model = ScriptedModel(plan, self.make_engine(plan.order), self.codec)
        self.models.append(model)
        return model

    async def start(self) -> None:
        self.started = True

    async def stop(self) -> None:
        self.stopped = True
