"""The workers of one model, one a rank, which start, load and end together.

To the engine they are one worker: orders go to rank 0, whose reports are the model's. Knows how ranks end,
not what they compute.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, Final, Self

import msgspec

from cortex.neuron.engine.messages import (
    Broken,
    Load,
    LoadProgress,
    LoadRefused,
    Order,
    Ready,
    Report,
    Threads,
)
from cortex.neuron.processes import WarmServer, to_its_end
from cortex.neuron.silence import silence
from cortex.neuron.thread_share import thread_share
from cortex.neuron.worker_process import FINE, WorkerProcess
from cortex.wire.errors import LoadFailed
from cortex.wire.node import Progress

LOAD_SILENCE_S: Final = 600.0
"""A load on several ranks of which none tells any progress for so long is given up."""

TellProgress = Callable[[Progress], None]
_Totals = dict[int, tuple[int, int]]
"""Of each rank that has told: bytes read, and bytes in all."""


class RankGroup:
    """Running workers by rank. Its owner calls `close` once, which ends them however they are."""

    def __init__(self, workers: Sequence[WorkerProcess]) -> None:
        self._workers: Final = tuple(workers)
        self._reports: Final = [worker.reports() for worker in workers]
        self._end: asyncio.Task[str] | None = None
        self._failed_step: str | None = None
        self._heard = 0

    @classmethod
    async def start(cls, warm: WarmServer, devices: Sequence[str], threads: int) -> Self:
        """A worker on each device, rank 0 with a socket to every other one. Raises LoadFailed."""
        links = [socket.socketpair() for _ in devices[1:]]
        workers: list[WorkerProcess] = []
        try:
            for rank, device in enumerate(devices):
                mine = (links[rank - 1][1],) if rank else tuple(pair[0] for pair in links)
                workers.append(await warm.spawn(device, thread_share(threads, rank, len(devices)), mine))
        except BaseException:
            await to_its_end(cls(workers).close())
            raise
        finally:
            for pair in links:
                for link in pair:
                    link.close()
        return cls(workers)

    async def load(self, order: Load, devices: Sequence[str], report: TellProgress) -> None:
        """Have every rank load its share; from then on they end together.

        Progress is told in bytes of all ranks. Raises LoadFailed as soon as one rank cannot, or none of
        several goes on.
        """
        totals: _Totals = {}
        loads = [
            asyncio.ensure_future(self._load_rank(rank, self._of_rank(order, rank, device), totals, report))
            for rank, device in enumerate(devices)
        ]
        losses = [asyncio.ensure_future(self._lose_rank(rank, load)) for rank, load in enumerate(loads)]
        all_loaded, one_lost = asyncio.gather(*loads), asyncio.gather(*losses)
        silent = asyncio.ensure_future(silence(LOAD_SILENCE_S, lambda: self._heard, lambda: len(loads) > 1))
        try:
            await asyncio.wait((all_loaded, one_lost, silent), return_when=asyncio.FIRST_COMPLETED)
            if silent.done():
                missing = ", ".join(str(rank) for rank, load in enumerate(loads) if not load.done())
                raise LoadFailed(
                    f"Nothing was heard for {LOAD_SILENCE_S:g} s of ranks {missing} of {len(loads)}, which "
                    f"were loading the model."
                )
            if not all_loaded.done():
                await one_lost  # which raises, else all would have been waited for
            loaded = all(await all_loaded) and not any(loss.done() for loss in losses)
        finally:
            tasks: list[asyncio.Future[Any]] = [all_loaded, one_lost, silent, *loads, *losses]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        if not loaded:
            raise LoadFailed("The workers ended by themselves while they loaded the model.")
        self._end = asyncio.create_task(self._end_together(), name="end of a model's ranks")

    @property
    def reports(self) -> AsyncIterator[Report]:
        """What rank 0 says once the model is loaded."""
        return self._reports[0]

    async def send(self, order: Order) -> None:
        """Waits while the worker's socket is full. Raises OSError if the worker is gone."""
        await self._workers[0].send(order)

    def post(self, order: Order) -> None:
        """Send something small without waiting; to workers that are gone it is lost."""
        if not isinstance(order, Threads):
            self._workers[0].post(order)
            return
        for rank, worker in enumerate(self._workers):
            worker.post(Threads(threads=thread_share(order.threads, rank, len(self._workers))))

    @property
    def failed_step(self) -> str | None:
        """After the end: how a step failed on a rank other than 0, which tells its own failures with the
        step; None if that is not why they ended. Follows "it".
        """
        return self._failed_step

    async def ended(self) -> str:
        """Waits for the end and tells it in words that follow "it"."""
        assert self._end is not None, "not loaded"
        return await asyncio.shield(self._end)

    async def ends_within(self, seconds: float) -> bool:
        """Waits at most so long for the end."""
        assert self._end is not None, "not loaded"
        done, _ = await asyncio.wait([self._end], timeout=seconds)
        return bool(done)

    def kill(self) -> None:
        for worker in self._workers:
            worker.kill()

    async def close(self) -> None:
        """End the processes; returns when all are gone and their memory is back."""
        await asyncio.gather(*(worker.close() for worker in self._workers))
        if self._end is not None:
            await asyncio.wait([self._end])

    def _of_rank(self, order: Load, rank: int, device: str) -> Load:
        world = len(self._workers)
        threads = thread_share(order.threads, rank, world)
        return msgspec.structs.replace(order, rank=rank, world=world, device=device, threads=threads)

    async def _load_rank(self, rank: int, order: Load, totals: _Totals, report: TellProgress) -> bool:
        """False if it ended quietly, which it does when another rank has ended. Raises LoadFailed."""
        worker = self._workers[rank]
        try:
            await worker.send(order)
            async for said in self._reports[rank]:
                self._heard += 1
                match said:
                    case LoadProgress():
                        totals[rank] = (said.done, said.total)
                        _tell(totals, len(self._workers), said.phase, report)
                    case LoadRefused():
                        raise LoadFailed(self._name(rank) + said.message, code=said.code)
                    case Ready():
                        return True
        except ValueError as error:
            raise LoadFailed(f"{self._name(rank)}The worker sent what is {error}.") from None
        except OSError:
            pass  # it has ended
        end = await worker.ended()
        if end == FINE:
            return False
        raise LoadFailed(f"{self._name(rank)}The worker {end} while it loaded the model.")

    async def _lose_rank(self, rank: int, load: asyncio.Future[bool]) -> None:
        """Returns when a rank has ended; raises LoadFailed if it had loaded, and nobody else would notice."""
        end = await self._workers[rank].ended()
        if await asyncio.shield(load) and end != FINE:
            raise LoadFailed(f"{self._name(rank)}The worker {end} while others loaded the model.")

    def _name(self, rank: int) -> str:
        """What precedes the words about one of several ranks."""
        return f"Rank {rank} of {len(self._workers)}: " if len(self._workers) > 1 else ""

    async def _end_together(self) -> str:
        """End all when one has ended, and tell which one and how."""
        said: dict[int, Broken] = {}
        listening = [asyncio.ensure_future(self._listen(rank, said)) for rank in range(1, len(self._workers))]
        ends = [asyncio.ensure_future(worker.ended()) for worker in self._workers]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        first = [rank for rank, end in enumerate(ends) if end.done()]
        self.kill()
        await asyncio.gather(*ends, *listening)
        # Those that end because another one did, do so in good order.
        rank = min(first, key=lambda rank: (ends[rank].result() == FINE and rank not in said, rank))
        end, world = ends[rank].result(), len(self._workers)
        broken = said.get(rank)
        if broken is not None and broken.cause == "silence":
            return f"lost a rank of {world}, which did not take part: rank {rank} {broken.reason}, and {end}"
        how = f"{broken.reason}, and {end}" if broken else end
        if world == 1 or (rank == 0 and how == FINE):
            return how
        return f"lost rank {rank} of {world}, which {how}"

    async def _listen(self, rank: int, said: dict[int, Broken]) -> None:
        """Hear from a rank other than 0, which speaks only of its end."""
        with contextlib.suppress(ValueError):
            async for report in self._reports[rank]:
                if isinstance(report, Broken):
                    said[rank] = report
                    if report.cause == "step":
                        self._failed_step = f"{report.reason} on rank {rank} of {len(self._workers)}"


def _tell(totals: _Totals, world: int, phase: str, report: TellProgress) -> None:
    if len(totals) == world:  # else the total would grow
        done, total = (sum(numbers) for numbers in zip(*totals.values(), strict=True))
        report(Progress(phase=phase, done=done, total=total))
