from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cortex.hookspecs import EngineStep, EngineTimings, Sampling, TokenBatch, TokenLogprobs
from cortex.neuron.engine.messages import Broken, Cancel, Generate, Order, Output, Report, Step, Threads
from cortex.neuron.silence import TICKS
from cortex.neuron.worker_engine import WorkerEngine
from cortex.testing.clock import settle
from cortex.wire.errors import BadRequest, Busy, Internal, Loading

SAMPLING = Sampling(max_tokens=10)


class FakeWorker:
    """A worker process that says what the test puts into its mouth."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.mouth: asyncio.Queue[Report | Exception | None] = asyncio.Queue()
        self.exit = asyncio.Event()
        self.end = "ended with exit code 0"
        self.broken = False
        self.failed_step: str | None = None

    async def reports(self) -> AsyncIterator[Report]:
        while (said := await self.mouth.get()) is not None:
            if isinstance(said, Exception):
                raise said
            yield said

    def say(self, *outputs: Output) -> None:
        self.mouth.put_nowait(Step(outputs=list(outputs)))

    def die(self, end: str) -> None:
        self.end = end
        self.mouth.put_nowait(None)
        self.exit.set()

    async def send(self, order: Order) -> None:
        if self.broken:
            raise BrokenPipeError
        self.orders.append(order)

    def post(self, order: Order) -> None:
        self.orders.append(order)

    async def ended(self) -> str:
        await self.exit.wait()
        return self.end

    async def ends_within(self, seconds: float) -> bool:
        await settle()
        return self.exit.is_set()

    def kill(self) -> None:
        self.die("was killed")

    async def close(self) -> None:
        self.kill()


@pytest.fixture
async def worker() -> FakeWorker:
    return FakeWorker()


@pytest.fixture
async def engine(worker: Any) -> AsyncIterator[WorkerEngine]:
    engine = WorkerEngine("m", worker, worker.reports())
    yield engine
    await engine.close()


async def test_a_sequence_goes_out_and_its_outputs_come_back(
    engine: WorkerEngine, worker: FakeWorker
) -> None:
    batches = engine.generate("r1", [1, 2], SAMPLING)
    first = asyncio.ensure_future(anext(batches))
    await settle()
    assert worker.orders == [Generate(key=1, request_id="r1", ids=[1, 2], sampling=SAMPLING)]
    worker.say(Output(key=1, ids=[7]))
    assert await first == TokenBatch(ids=[7])
    timings = EngineTimings(decode_ms=5.0)
    worker.say(Output(key=1, ids=[], finish="stop", timings=timings))
    assert await anext(batches) == TokenBatch(ids=[], finish="stop", timings=timings)
    with pytest.raises(StopAsyncIteration):
        await anext(batches)
    assert len(worker.orders) == 1, "a finished sequence is not cancelled"


async def test_sequences_are_kept_apart(engine: WorkerEngine, worker: FakeWorker) -> None:
    async def collect(request_id: str) -> list[int]:
        return [id async for batch in engine.generate(request_id, [1], SAMPLING) for id in batch.ids]

    tasks = [asyncio.create_task(collect(name)) for name in ("a", "b")]
    await settle()
    worker.say(Output(key=1, ids=[10]), Output(key=2, ids=[20]))
    worker.say(Output(key=99, ids=[0]), Output(key=2, ids=[21], finish="length"))
    worker.say(Output(key=1, ids=[11], finish="stop"))
    assert [await task for task in tasks] == [[10, 11], [20, 21]]


async def test_steps_that_nobody_took_yet_come_joined(engine: WorkerEngine, worker: FakeWorker) -> None:
    batches = engine.generate("r", [1], SAMPLING)
    first = asyncio.ensure_future(anext(batches))
    await settle()
    worker.say(Output(key=1, ids=[1]))
    await first
    for id in (2, 3):
        worker.say(Output(key=1, ids=[id]))
    worker.say(Output(key=1, ids=[4], finish="stop"))
    await settle()
    assert await anext(batches) == TokenBatch(ids=[2, 3, 4], finish="stop")
    await batches.aclose()


@pytest.mark.parametrize("taken", [0, 1])
async def test_closing_a_sequence_cancels_it_once(
    engine: WorkerEngine, worker: FakeWorker, taken: int
) -> None:
    batches = engine.generate("r", [1], SAMPLING)
    task = asyncio.ensure_future(anext(batches))
    await settle()
    if taken:
        worker.say(Output(key=1, ids=[5]))
        await task
        await batches.aclose()
    else:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert worker.orders[1:] == [Cancel(key=1)]
    worker.say(Output(key=1, ids=[6]))
    await settle()


async def test_a_sequence_that_fails_takes_no_other_along(engine: WorkerEngine, worker: FakeWorker) -> None:
    good, bad = engine.generate("good", [1], SAMPLING), engine.generate("bad", [1], SAMPLING)
    tasks = [asyncio.ensure_future(anext(each)) for each in (good, bad)]
    await settle()
    worker.say(Output(key=2, ids=[], error="the logits are not finite"), Output(key=1, ids=[3]))
    assert await tasks[0] == TokenBatch(ids=[3])
    with pytest.raises(Internal, match="the logits are not finite"):
        await tasks[1]
    await good.aclose()


async def test_a_step_that_failed_on_another_rank_is_an_error_of_its_sequences(
    engine: WorkerEngine, worker: FakeWorker
) -> None:
    """As one on rank 0 is: a request that takes too much memory must not be sent to node after node."""
    asked = asyncio.ensure_future(anext(engine.generate("r", [1], SAMPLING)))
    await settle()
    worker.failed_step = "ran out of memory in a step on rank 1 of 2"
    worker.die("lost rank 1 of 2")
    with pytest.raises(Internal, match="The model ran out of memory in a step on rank 1 of 2"):
        await asked
    with pytest.raises(Loading):  # it was in no step
        await anext(engine.generate("later", [1], SAMPLING))


class Ticks:
    """A watch over the engine whose time passes when the test says so."""

    def __init__(self, worker: FakeWorker) -> None:
        self._ticks: asyncio.Queue[None] = asyncio.Queue()
        self.engine = WorkerEngine("m", worker, worker.reports(), patience_s=70, sleep=self._sleep)

    async def _sleep(self, seconds: float) -> None:
        await self._ticks.get()

    async def pass_(self, count: int = TICKS + 1) -> None:
        for _ in range(count):
            await settle()
            self._ticks.put_nowait(None)
        await settle()


async def test_ranks_that_make_no_step_are_ended(worker: FakeWorker) -> None:
    ticks = Ticks(worker)
    await ticks.pass_()
    asked = asyncio.ensure_future(anext(ticks.engine.generate("r", [1], SAMPLING)))
    await ticks.pass_(TICKS - 1)
    worker.say()  # a step of a long prompt, which gives nobody anything yet
    await ticks.pass_(TICKS)
    assert not asked.done()
    await ticks.pass_(1)
    with pytest.raises(Loading, match="The engine of m made no step for 70 s while it worked"):
        await asked
    assert await ticks.engine.died() == "made no step for 70 s"
    await ticks.engine.close()


async def test_a_client_that_does_not_take_its_text_is_not_the_ranks_silence(worker: FakeWorker) -> None:
    ticks = Ticks(worker)
    batches = ticks.engine.generate("r", [1], SAMPLING)
    asked = asyncio.ensure_future(anext(batches))
    await settle()
    worker.say(Output(key=1, ids=[5]))
    await asked
    worker.say(Output(key=1, ids=[6], finish="stop"))
    await ticks.pass_(3 * TICKS)
    assert not worker.exit.is_set()
    assert (await anext(batches)).ids == [6]
    await ticks.engine.close()


async def test_death_reaches_every_sequence_and_the_owner(engine: WorkerEngine, worker: FakeWorker) -> None:
    running = [asyncio.ensure_future(anext(engine.generate(name, [1], SAMPLING))) for name in ("a", "b")]
    died = asyncio.ensure_future(engine.died())
    await settle()
    worker.say(Output(key=1, ids=[3]))
    worker.die("was killed by SIGSEGV")
    assert await died == "was killed by SIGSEGV"
    assert await running[0] == TokenBatch(ids=[3]), "what came before is not lost"
    with pytest.raises(Loading, match="engine of m was killed by SIGSEGV") as failure:
        await running[1]
    assert (failure.value.code, failure.value.retry_after) == ("engine_ended", 1)
    with pytest.raises(Loading):
        await anext(engine.generate("late", [1], SAMPLING))


async def test_a_worker_that_went_while_we_wrote_is_told_like_a_death(
    engine: WorkerEngine, worker: FakeWorker
) -> None:
    worker.broken = True
    task = asyncio.ensure_future(anext(engine.generate("r", [1], SAMPLING)))
    await settle()
    worker.die("was killed by SIGKILL")
    with pytest.raises(Loading, match="SIGKILL"):
        await task


async def test_a_worker_that_talks_nonsense_is_ended(engine: WorkerEngine, worker: FakeWorker) -> None:
    worker.mouth.put_nowait(ValueError("not a report: junk"))
    assert await engine.died() == "sent what is not a report: junk, and was killed"


async def test_a_worker_that_hangs_up_but_stays_is_ended(engine: WorkerEngine, worker: FakeWorker) -> None:
    worker.mouth.put_nowait(None)
    assert await engine.died() == "was killed"


async def test_an_engine_that_says_that_it_is_broken_is_told_with_its_reason(
    engine: WorkerEngine, worker: FakeWorker
) -> None:
    tasks = [asyncio.ensure_future(anext(engine.generate(name, [1], SAMPLING))) for name in ("r", "waits")]
    await settle()
    worker.say(Output(key=1, ids=[], error="The model ran out of memory in a step."))
    worker.mouth.put_nowait(Broken(reason="ran out of memory in a step"))
    worker.die("ended by itself")
    with pytest.raises(Internal, match="ran out of memory"):
        await tasks[0]
    with pytest.raises(Loading) as failure:  # it was not in the step
        await tasks[1]
    assert (failure.value.code, failure.value.retry_after) == ("engine_ended", 1)
    assert await engine.died() == "ran out of memory in a step, and ended by itself"
    with pytest.raises(Loading, match="engine of m ran out of memory in a step, and ended by itself"):
        await anext(engine.generate("late", [1], SAMPLING))


async def test_a_sequence_that_waited_in_vain_is_busy_and_may_come_again(
    engine: WorkerEngine, worker: FakeWorker
) -> None:
    task = asyncio.ensure_future(anext(engine.generate("r", [1], SAMPLING)))
    await settle()
    worker.say(Output(key=1, ids=[], error="it waited 5 s and could not start", code="busy"))
    with pytest.raises(Busy, match="no room for this request: it waited 5 s") as refusal:
        await task
    assert refusal.value.retry_after == 10


async def test_a_sequence_that_cannot_be_run_is_the_requests_fault(
    engine: WorkerEngine, worker: FakeWorker
) -> None:
    task = asyncio.ensure_future(anext(engine.generate("r", [], SAMPLING)))
    await settle()
    worker.say(Output(key=1, ids=[], error="The prompt is empty.", code="invalid"))
    with pytest.raises(BadRequest, match="The prompt is empty") as refusal:
        await task
    assert (refusal.value.status, refusal.value.param) == (400, "messages")


async def test_what_was_cached_and_what_was_asked_about_tokens_survive_joining(
    engine: WorkerEngine, worker: FakeWorker
) -> None:
    told = [TokenLogprobs(id, -0.5, [(id, -0.5)]) for id in (1, 2)]
    batches = engine.generate("r", [1], SAMPLING)
    first = asyncio.ensure_future(anext(batches))
    await settle()
    worker.say(Output(key=1, ids=[1], cached_tokens=64, logprobs=told[:1]))
    worker.say(Output(key=1, ids=[2], logprobs=told[1:]))
    assert await first == TokenBatch(ids=[1, 2], cached_tokens=64, logprobs=told)
    worker.say(Output(key=1, ids=[], finish="stop"))
    assert await anext(batches) == TokenBatch(ids=[], finish="stop")
    await batches.aclose()


async def test_every_step_is_told_to_whoever_watches(engine: WorkerEngine, worker: FakeWorker) -> None:
    seen: list[EngineStep] = []
    worker.mouth.put_nowait(Step(outputs=[], done=EngineStep(seconds=1.0)))
    await settle()
    engine.watch(seen.append)
    for report in (Step(outputs=[], done=EngineStep(seconds=2.0)), Step(outputs=[Output(key=9, ids=[])])):
        worker.mouth.put_nowait(report)
    await settle()
    assert seen == [EngineStep(seconds=2.0)], "a refusal is no step, and what was before is over"


@pytest.mark.parametrize("error", [ValueError("cannot count"), RuntimeError("cannot count")])
async def test_whoever_fails_to_watch_takes_no_reply_along(
    engine: WorkerEngine, worker: FakeWorker, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    def fail(step: EngineStep) -> None:
        raise error

    engine.watch(fail)
    asked = asyncio.ensure_future(anext(engine.generate("r", [1], SAMPLING)))
    await settle()
    worker.mouth.put_nowait(Step(outputs=[], done=EngineStep(seconds=1.0)))
    worker.say(Output(key=1, ids=[5], finish="stop"))
    async with asyncio.timeout(5):
        assert (await asked).ids == [5]
    assert "cannot count" in caplog.text


async def test_threads_are_ordered_from_an_engine_that_runs(engine: WorkerEngine, worker: FakeWorker) -> None:
    engine.set_threads(3)
    assert worker.orders == [Threads(threads=3)]
    worker.die("was killed by SIGKILL")
    await engine.died()
    engine.set_threads(2)
    assert worker.orders == [Threads(threads=3)]


async def test_a_reader_that_takes_nothing_holds_up_nobody(engine: WorkerEngine, worker: FakeWorker) -> None:
    slow, quick = (engine.generate(name, [1], SAMPLING) for name in ("slow", "quick"))
    tasks = [asyncio.ensure_future(anext(each)) for each in (slow, quick)]
    await settle()
    for id in range(50):
        worker.say(Output(key=1, ids=[id]), Output(key=2, ids=[id]))
        await settle()
    assert (await tasks[1]).ids[0] == 0
    worker.say(Output(key=1, ids=[50], finish="length"), Output(key=2, ids=[50], finish="length"))
    await settle()
    assert [batch.finish async for batch in quick] == ["length"]
    assert (await tasks[0]).ids[0] == 0
    assert [(batch.ids[-1], batch.finish) async for batch in slow] == [(50, "length")]
