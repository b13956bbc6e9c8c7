"""What is small and quick is made at once, all else in a thread, which is nobody's when nobody waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from cortex.neuron.text.aside import LARGE, OF_ONE, QUICK, SLOW_S, THREADS, Aside
from cortex.testing import ManualClock
from cortex.wire.errors import BadRequest


@pytest.fixture
def aside(clock: ManualClock) -> Aside:
    return Aside(clock)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def taking(clock: ManualClock, seconds: float) -> Callable[[], bool]:
    """Work that takes so long, and tells whether it was done at once."""

    def work() -> bool:
        clock.now += seconds
        return threading.current_thread() is threading.main_thread()

    return work


@pytest.mark.parametrize(("size", "at_once"), [(0, True), (LARGE - 1, True), (LARGE, False)])
async def test_what_is_large_is_done_in_a_thread(
    aside: Aside, clock: ManualClock, size: int, at_once: bool
) -> None:
    assert await aside.run("m", size, taking(clock, 0.001)) is at_once


async def test_a_model_whose_small_prompts_take_long_is_left_to_a_thread_from_then_on(
    aside: Aside, clock: ManualClock
) -> None:
    assert await aside.run("m", 10, taking(clock, SLOW_S)) is True
    assert await aside.run("m", LARGE, taking(clock, 9)) is False
    assert await aside.run("m", 10, taking(clock, 2 * SLOW_S)) is True
    assert await aside.run("m", 10, taking(clock, 0)) is False
    assert await aside.run("other", 10, taking(clock, 0)) is True


@pytest.mark.parametrize("size", [0, LARGE])
async def test_what_the_work_raises_comes_out(aside: Aside, clock: ManualClock, size: int) -> None:
    def work() -> None:
        clock.now += 1
        raise BadRequest("no")

    with pytest.raises(BadRequest, match="no"):
        await aside.run("m", size, work)
    assert await aside.run("m", 0, taking(clock, 0)) is (size == LARGE), "slow is slow, also if it fails"


async def test_a_model_that_is_quick_again_is_done_at_once_again(aside: Aside, clock: ManualClock) -> None:
    """One slow time may have been somebody else's."""
    await aside.run("m", 10, taking(clock, 2 * SLOW_S))
    for seconds in (*[SLOW_S / 2] * (QUICK - 1), 2 * SLOW_S, *[SLOW_S / 2] * QUICK):
        assert await aside.run("m", 10, taking(clock, seconds)) is False
    assert await aside.run("m", 10, taking(clock, SLOW_S / 2)) is True


async def test_the_time_of_others_makes_no_model_slow() -> None:
    """A thread that waits, as for a processor that another one has, uses none of its own."""
    aside = Aside()
    await aside.run("m", 10, lambda: threading.Event().wait(1.2 * SLOW_S))
    assert await aside.run("m", 10, lambda: threading.current_thread() is threading.main_thread())


async def test_a_model_whose_prompts_hang_leaves_threads_to_others(aside: Aside, clock: ManualClock) -> None:
    gate = threading.Event()
    tasks = [asyncio.ensure_future(aside.run("m", LARGE, lambda: gate.wait(10))) for _ in range(THREADS)]
    try:
        assert await asyncio.wait_for(aside.run("other", LARGE, taking(clock, 0)), 5) is False
    finally:
        gate.set()
    assert await asyncio.gather(*tasks) == [True] * THREADS


async def test_who_leaves_waits_for_no_thread_and_work_that_has_not_begun_is_not_done(aside: Aside) -> None:
    gate, begun, ended, done = threading.Event(), threading.Semaphore(0), threading.Semaphore(0), []

    def work(number: int) -> Any:
        begun.release()
        gate.wait(10)
        done.append(number)
        ended.release()

    tasks = [
        asyncio.ensure_future(aside.run("m", LARGE, lambda number=number: work(number)))
        for number in range(OF_ONE + 2)
    ]
    for _ in range(OF_ONE):
        await asyncio.to_thread(begun.acquire)
    for task in (tasks[0], tasks[OF_ONE]):
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    gate.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    for _ in range(OF_ONE + 1):  # that of who has left among them
        await asyncio.to_thread(ended.acquire)
    assert sorted(done) == [number for number in range(OF_ONE + 2) if number != OF_ONE]
