"""A load under way that any number of callers wait for, and that ends when the last of them leaves.

Knows waiting only; what a load does and what it means for a model is `residents`' business.
"""

from __future__ import annotations

import asyncio

from cortex.neuron.references import Report
from cortex.neuron.resident import Served
from cortex.wire.errors import CortexError
from cortex.wire.node import LoadRequest, ModelReport, Progress


def ignore(progress: Progress) -> None:
    """For those who do not care how far a load is."""


class SharedLoad:
    """One load under way by `request`, and those who wait for it."""

    def __init__(self, request: LoadRequest, task: asyncio.Task[Served], started: float) -> None:
        self.request = request
        self.task = task
        self.started = started
        self.outcome: asyncio.Future[ModelReport] = asyncio.get_running_loop().create_future()
        self.outcome.add_done_callback(lambda done: done.cancelled() or done.exception())
        self.abandoned = False
        self.settled = asyncio.Event()
        """The model's status says what became of the load."""
        self._waiters: dict[object, Report] = {}
        self._last: Progress | None = None

    async def join(self, report: Report) -> ModelReport:
        """Wait for the outcome. The last one to leave before it is there ends the load."""
        token = object()
        self._waiters[token] = report
        if self._last is not None:
            report(self._last)
        try:
            return await asyncio.shield(self.outcome)
        finally:
            del self._waiters[token]
            if not self._waiters and not self.outcome.done():
                self.abandon()

    def tell(self, progress: Progress) -> None:
        self._last = progress
        for report in list(self._waiters.values()):
            report(progress)

    def abandon(self, error: CortexError | None = None) -> None:
        """End the load; those who still wait get `error`."""
        self.abandoned = True
        self.task.cancel()
        if error is not None:
            self.fail(error)

    def fail(self, error: CortexError) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)

    def succeed(self, report: ModelReport) -> None:
        if not self.outcome.done():
            self.outcome.set_result(report)
