"""A TokenEngine over a worker process: sequences go out as messages, their outputs come back by key.

Knows the messages and how a worker ends; not what a model is.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from typing import Final, Protocol

from cortex.hookspecs import Codec, EngineStep, Sampling, TokenBatch, TokenLogprobs
from cortex.neuron.engine.messages import (
    Broken,
    Cancel,
    Generate,
    Order,
    Output,
    Report,
    Step,
    Threads,
)
from cortex.neuron.silence import Sleep, silence
from cortex.wire.errors import BadRequest, Busy, CortexError, Internal, Loading

_log: Final = logging.getLogger("cortex.neuron.engine")
_GRACE_S: Final = 1.0
"""For a worker that has closed its socket, to end by itself and tell by its exit code why."""
_BUSY_RETRY_S: Final = 10
"""For a request that has waited for its turn in vain."""
_END: Final = None
"""In a sequence's queue: nothing more will come, the engine has ended."""


class Worker(Protocol):
    """What computes: the workers of all ranks of a model, as one."""

    async def send(self, order: Order) -> None:
        """Raises OSError if it is gone."""

    def post(self, order: Order) -> None:
        """Without waiting; what is posted to one that is gone is lost."""

    async def ended(self) -> str:
        """Waits for its end and tells it in words that follow "it"."""
        ...

    async def ends_within(self, seconds: float) -> bool: ...

    @property
    def failed_step(self) -> str | None:
        """After its end: how a step failed whose outputs never came, if that is why. Follows "it"."""

    def kill(self) -> None: ...

    async def close(self) -> None:
        """End it; returns when its memory is back."""


class WorkerEngine:
    """The engine in a worker that has loaded its model. `reports` is what the worker says from now on."""

    def __init__(
        self,
        model_id: str,
        worker: Worker,
        reports: AsyncIterator[Report],
        *,
        patience_s: float | None = None,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        """A worker that makes no step for `patience_s` while it has sequences is ended; with None it is
        waited for.
        """
        self._model_id = model_id
        self._worker = worker
        self._keys = itertools.count(1)
        self._queues: dict[int, asyncio.Queue[Output | None]] = {}
        self._seen: Callable[[EngineStep], None] = lambda step: None
        self._unfinished: set[int] = set()
        self._steps = 0
        self._given_up: str | None = None
        self._reader = asyncio.create_task(self._read(reports), name=f"reader of {model_id}")
        if patience_s is not None:
            watch = asyncio.create_task(self._watch_steps(patience_s, sleep), name=f"watch over {model_id}")
            self._reader.add_done_callback(lambda reader: watch.cancel())

    async def generate(
        self, request_id: str, ids: Sequence[int], sampling: Sampling
    ) -> AsyncGenerator[TokenBatch, None]:
        """Yields what each step gave; steps that nobody has taken yet come joined.

        Raises BadRequest if the engine cannot run the sequence, Internal if it or a step fails, Busy if it
        has waited too long to start, Loading with the code `engine_ended` if the engine dies.
        """
        key = next(self._keys)
        queue: asyncio.Queue[Output | None] = asyncio.Queue()
        self._queues[key] = queue
        finished = False
        try:
            if self._reader.done():
                raise await self._ended()
            self._unfinished.add(key)
            try:
                await self._worker.send(
                    Generate(key=key, request_id=request_id, ids=list(ids), sampling=sampling)
                )
            except OSError:
                raise await self._ended() from None
            while not finished:
                outputs = [await queue.get()]
                while not queue.empty():
                    outputs.append(queue.get_nowait())
                batch = _joined(outputs)
                if batch is not None:
                    finished = batch.finish is not None
                    yield batch
                if not finished and outputs[-1] is _END:
                    raise await self._ended()
        finally:
            del self._queues[key]
            self._unfinished.discard(key)
            if not finished and not self._reader.done():
                self._worker.post(Cancel(key=key))

    def watch(self, seen: Callable[[EngineStep], None]) -> None:
        self._seen = seen

    def set_threads(self, threads: int) -> None:
        """Without effect on a worker that has ended."""
        if not self._reader.done():
            self._worker.post(Threads(threads=threads))

    async def died(self) -> str:
        """Waits until the worker has ended by itself and tells how."""
        return await asyncio.shield(self._reader)

    async def close(self) -> None:
        """End the worker; its memory is back when this returns."""
        await self._worker.close()
        await asyncio.wait([self._reader])

    async def _read(self, reports: AsyncIterator[Report]) -> str:
        """Hand out what the worker says until it ends, and tell how it ended."""
        said = ""
        grace = _GRACE_S
        try:
            async for report in reports:
                if isinstance(report, Step):
                    self._steps += 1
                    for output in report.outputs:
                        if output.finish is not None or output.error is not None:
                            self._unfinished.discard(output.key)
                        if output.key in self._queues:
                            self._queues[output.key].put_nowait(output)
                    if report.done is not None:
                        self._tell(report.done)
                elif isinstance(report, Broken):
                    said = f"{report.reason}, and "
        except ValueError as error:
            said = f"sent what is {error}, and "
            grace = 0.0
        if not await self._worker.ends_within(grace):
            self._worker.kill()  # it closed its socket or talks nonsense: it serves nobody any more
        ended = await self._worker.ended()
        reason = self._given_up or said + ended
        failed = self._worker.failed_step
        for key, queue in self._queues.items():
            # What failed once may fail everywhere, so it is not for the gateway to try again.
            queue.put_nowait(Output(key=key, ids=[], error=f"The model {failed}.") if failed else _END)
        return reason

    def _tell(self, step: EngineStep) -> None:
        """Who watches may fail, and takes no sequence along."""
        try:
            self._seen(step)
        except Exception:
            _log.exception("a step was not counted model=%s", self._model_id)

    async def _watch_steps(self, patience_s: float, sleep: Sleep) -> None:
        await silence(patience_s, lambda: self._steps, lambda: bool(self._unfinished), sleep=sleep)
        self._given_up = f"made no step for {patience_s:g} s"
        self._worker.kill()

    async def _ended(self) -> Loading:
        reason = await self.died()
        return Loading(
            f"The engine of {self._model_id} {reason} while it worked on this request. Send the request "
            f"again: the model is loaded again for it.",
            code="engine_ended",
            retry_after=1,
        )


class WorkerModel:
    """A LoadedModel whose engine is a worker process."""

    def __init__(self, engine: WorkerEngine, codec: Codec) -> None:
        self.engine = engine
        self.codec = codec

    def watch(self, seen: Callable[[EngineStep], None]) -> None:
        self.engine.watch(seen)

    def set_threads(self, threads: int) -> None:
        self.engine.set_threads(threads)

    async def died(self) -> str:
        return await self.engine.died()

    async def close(self) -> None:
        await self.engine.close()


def _joined(outputs: Sequence[Output | None]) -> TokenBatch | None:
    """One batch of several steps' outputs. Raises what became of a sequence that failed."""
    ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    cached: int | None = None
    last: Output | None = None
    for output in outputs:
        if output is _END:
            break
        if output.error is not None:
            raise _failure(output)
        last = output
        ids += output.ids
        logprobs += output.logprobs or ()
        cached = output.cached_tokens if cached is None else cached
        if output.finish is not None:
            break
    if last is None:
        return None
    return TokenBatch(
        ids=ids,
        finish=last.finish,
        timings=last.timings,
        cached_tokens=cached,
        logprobs=logprobs or None,
    )


def _failure(output: Output) -> CortexError:
    if output.code == "busy":
        return Busy(f"The model has no room for this request: {output.error}.", retry_after=_BUSY_RETRY_S)
    if output.code == "invalid":
        return BadRequest(output.error or "", param="messages")
    return Internal(f"The engine failed on this request: {output.error}")
