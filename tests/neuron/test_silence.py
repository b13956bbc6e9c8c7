"""Silence is counted in ticks, which pass here when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from cortex.neuron.silence import TICKS, silence
from cortex.testing.clock import settle


class Bench:
    def __init__(self) -> None:
        self.heard = 0
        self.due = True
        self.slept: list[float] = []
        self._ticks: asyncio.Queue[None] = asyncio.Queue()
        self.task = asyncio.create_task(silence(60, lambda: self.heard, lambda: self.due, sleep=self._sleep))

    async def _sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        await self._ticks.get()

    async def tick(self, count: int = 1) -> bool:
        """Whether it is over after so many ticks."""
        for _ in range(count):
            await settle()
            self._ticks.put_nowait(None)
        await settle()
        return self.task.done()


@pytest.fixture
async def bench() -> AsyncIterator[Bench]:
    bench = Bench()
    yield bench
    bench.task.cancel()
    await asyncio.gather(bench.task, return_exceptions=True)


async def test_it_is_over_when_nothing_came_for_the_whole_time(bench: Bench) -> None:
    assert not await bench.tick(TICKS - 1)
    assert await bench.tick()
    assert sum(bench.slept) == pytest.approx(60)


async def test_whatever_is_heard_begins_the_time_anew(bench: Bench) -> None:
    await bench.tick(TICKS - 1)
    bench.heard += 1
    assert not await bench.tick(TICKS)
    assert await bench.tick()


async def test_where_nothing_is_due_nothing_is_missed(bench: Bench) -> None:
    bench.due = False
    assert not await bench.tick(2 * TICKS)
    bench.due = True
    assert not await bench.tick(TICKS)
    assert await bench.tick()
