"""How the node handles the workers of one model, with workers that say what the test wants."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from cortex.neuron.engine.messages import (
    Broken,
    Cancel,
    Load,
    LoadProgress,
    LoadRefused,
    Order,
    Ready,
    Report,
    Step,
    Threads,
)
from cortex.neuron.rank_group import RankGroup
from cortex.neuron.worker_process import FINE
from cortex.wire.errors import LoadFailed
from cortex.wire.node import Progress

READY = Ready(weight_bytes=1, cache_bytes=1)
ORDER = Load(
    path="m",
    dtype="float32",
    device="x",
    context=8,
    cache_tokens=8,
    prefill_chunk=8,
    threads=5,
    max_running=3,
)
DEVICES = ("GPU-a", "GPU-b", "GPU-c")


class FakeWorker:
    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.mouth: asyncio.Queue[Report | Exception | None] = asyncio.Queue()
        self.exit: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.closed = False

    def say(self, *reports: Report | Exception) -> None:
        for report in reports:
            self.mouth.put_nowait(report)

    def die(self, end: str) -> None:
        if not self.exit.done():
            self.mouth.put_nowait(None)
            self.exit.set_result(end)

    async def reports(self) -> AsyncIterator[Report]:
        while (said := await self.mouth.get()) is not None:
            if isinstance(said, Exception):
                raise said
            yield said

    async def send(self, order: Order) -> None:
        if self.exit.done():
            raise BrokenPipeError
        self.post(order)

    def post(self, order: Order) -> None:
        self.orders.append(order)

    async def ended(self) -> str:
        return await asyncio.shield(self.exit)

    def kill(self) -> None:
        self.die("was killed by the node")

    async def close(self) -> None:
        self.kill()
        self.closed = True


class Bench:
    def __init__(self) -> None:
        self.workers = [FakeWorker() for _ in DEVICES]
        self.group = RankGroup(self.workers)  # type: ignore[arg-type]
        self.told: list[Progress] = []

    async def load(self) -> None:
        await self.group.load(ORDER, DEVICES, self.told.append)

    async def loaded(self) -> None:
        for worker in self.workers:
            worker.say(READY)
        await self.load()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    await bench.group.close()
    assert all(worker.closed for worker in bench.workers)


async def test_each_rank_is_told_its_place_its_device_and_its_part_of_the_threads(bench: Bench) -> None:
    await bench.loaded()
    orders: list[Any] = [worker.orders[0] for worker in bench.workers]
    assert [(order.rank, order.world, order.device, order.threads) for order in orders] == [
        (0, 3, "GPU-a", 2),
        (1, 3, "GPU-b", 2),
        (2, 3, "GPU-c", 1),
    ]
    assert {(order.path, order.max_running) for order in orders} == {("m", 3)}


async def test_progress_is_that_of_all_ranks_and_its_total_never_grows(bench: Bench) -> None:
    loading = asyncio.create_task(bench.load())
    for rank, done in ((0, 0), (0, 5), (1, 0), (2, 0), (2, 10), (0, 10), (1, 10)):
        bench.workers[rank].say(LoadProgress(phase="weights", done=done, total=10))
        while bench.workers[rank].mouth.qsize():
            await asyncio.sleep(0)
    for worker in bench.workers:
        worker.say(READY)
    await loading
    assert [(progress.done, progress.total) for progress in bench.told] == [
        (5, 30),
        (15, 30),
        (20, 30),
        (30, 30),
    ]
    assert {progress.phase for progress in bench.told} == {"weights"}


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize(
    ("reports", "end", "words"),
    [
        ([LoadRefused(code="load_failed", message="No.")], FINE, "Rank {} of 3: No"),
        ([ValueError("not a report")], FINE, "Rank {} of 3: The worker sent what is not a report"),
        ([], "was killed", "Rank {} of 3: The worker was killed while it loaded the model"),
    ],
)
async def test_one_rank_that_cannot_load_fails_the_load(
    bench: Bench, rank: int, reports: list[Any], end: str, words: str
) -> None:
    """The others are ready, or have ended because they miss it."""
    bench.workers[1].say(READY)
    bench.workers[2 - rank].die(FINE)
    bench.workers[rank].say(*reports)
    bench.workers[rank].die(end)
    if reports:  # so that it can be sent its order
        bench.workers[rank].exit = asyncio.get_running_loop().create_future()
    with pytest.raises(LoadFailed, match=words.format(rank)):
        await bench.load()


async def test_workers_that_all_end_without_a_word_have_not_loaded(bench: Bench) -> None:
    for worker in bench.workers:
        worker.die(FINE)
    with pytest.raises(LoadFailed, match="ended by themselves"):
        await bench.load()


async def test_a_rank_that_dies_when_it_has_loaded_fails_the_load_of_the_others(bench: Bench) -> None:
    loading = asyncio.create_task(bench.load())
    bench.workers[1].say(READY)
    while bench.workers[1].mouth.qsize():
        await asyncio.sleep(0)
    bench.workers[1].die("was killed")
    with pytest.raises(LoadFailed, match="Rank 1 of 3: The worker was killed while others loaded the model"):
        await asyncio.wait_for(loading, 5)


async def test_a_rank_that_ends_quietly_when_it_has_loaded_leaves_the_cause_to_the_others(
    bench: Bench,
) -> None:
    loading = asyncio.create_task(bench.load())
    bench.workers[1].say(READY)
    while bench.workers[1].mouth.qsize():
        await asyncio.sleep(0)
    bench.workers[1].die(FINE)
    bench.workers[0].die("was killed")
    with pytest.raises(LoadFailed, match="Rank 0 of 3: The worker was killed"):
        await asyncio.wait_for(loading, 5)


async def test_a_load_that_is_cancelled_leaves_no_task(bench: Bench) -> None:
    loading = asyncio.create_task(bench.load())
    await asyncio.sleep(0)
    loading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loading


async def test_orders_and_reports_are_rank_0s_and_threads_are_everybodys(bench: Bench) -> None:
    await bench.loaded()
    bench.workers[1].say(Broken(reason="said what nobody asked"))
    bench.workers[0].say(Step(outputs=[]))
    assert await anext(bench.group.reports) == Step(outputs=[])
    await bench.group.send(Cancel(key=1))
    bench.group.post(Cancel(key=2))
    bench.group.post(Threads(threads=4))
    assert bench.workers[0].orders[1:] == [Cancel(key=1), Cancel(key=2), Threads(threads=2)]
    assert [worker.orders[1:] for worker in bench.workers[1:]] == [[Threads(threads=1)]] * 2


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ({0: "was killed"}, "lost rank 0 of 3, which was killed"),
        ({2: "was killed"}, "lost rank 2 of 3, which was killed"),
        # Those that have lost another rank end quietly, and may be seen to end in the same moment.
        ({0: FINE, 1: "was killed", 2: FINE}, "lost rank 1 of 3, which was killed"),
        ({0: FINE}, FINE),
        ({1: FINE}, f"lost rank 1 of 3, which {FINE}"),
    ],
)
async def test_when_one_rank_ends_all_do_and_it_is_told_which_and_how(
    bench: Bench, ends: dict[int, str], words: str
) -> None:
    await bench.loaded()
    assert not await bench.group.ends_within(0)
    for rank, end in ends.items():
        bench.workers[rank].die(end)
    assert await bench.group.ended() == words
    assert await bench.group.ends_within(0)
    assert all(worker.exit.done() for worker in bench.workers)


@pytest.mark.parametrize(
    ("cause", "failed"), [("step", "ran out of memory in a step on rank 1 of 3"), ("engine", None)]
)
async def test_what_a_rank_said_of_its_end_is_told(bench: Bench, cause: Any, failed: str | None) -> None:
    await bench.loaded()
    bench.workers[1].say(Broken(reason="ran out of memory in a step", cause=cause))
    for worker in bench.workers[1:]:
        worker.die(FINE)
    assert await bench.group.ended() == f"lost rank 1 of 3, which ran out of memory in a step, and {FINE}"
    assert bench.group.failed_step == failed


async def test_the_rank_that_notices_a_silent_one_is_not_taken_for_it(bench: Bench) -> None:
    await bench.loaded()
    bench.workers[1].say(Broken(reason="waited for rank 0 in vain", cause="silence"))
    bench.workers[1].die(FINE)
    assert await bench.group.ended() == (
        f"lost a rank of 3, which did not take part: rank 1 waited for rank 0 in vain, and {FINE}"
    )
    assert bench.group.failed_step is None


async def test_of_a_model_that_is_not_divided_nobody_hears_of_ranks() -> None:
    worker = FakeWorker()
    group = RankGroup([worker])  # type: ignore[list-item]
    worker.say(LoadRefused(code="load_failed", message="No."))
    with pytest.raises(LoadFailed, match=r"^No\.$"):
        await group.load(ORDER, ("cpu",), lambda progress: None)
    worker.say(READY)
    await group.load(ORDER, ("cpu",), lambda progress: None)
    worker.die("was killed")
    assert await group.ended() == "was killed"
    await group.close()
