"""The worker's loop: read orders, schedule, forward, sample, send; before it, the load.

One rank of one model, one process. Ends when the socket does. Importing this module imports torch and all
that a load needs, and runs no torch operation: the warm server imports it before it forks.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterable
from typing import Final

import torch

from cortex.hookspecs import EngineStep
from cortex.neuron import heap
from cortex.neuron.engine.channel import Channel, PeerGone
from cortex.neuron.engine.loading import load_model, make_scheduler, out_of_memory
from cortex.neuron.engine.messages import (
    WATCHDOG_S,
    Broken,
    Cancel,
    Generate,
    Load,
    LoadRefused,
    Order,
    Output,
    Ready,
    Step,
    Threads,
)
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.runner import Runner
from cortex.neuron.engine.sampler import Row, sample
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.sequence import Sampled, Sequence, Tally
from cortex.neuron.models import registry
from cortex.neuron.nn.parallel import RankGone, RankSilent
from cortex.neuron.nn.placement import Share
from cortex.wire.errors import LoadFailed

_log: Final = logging.getLogger("cortex.neuron.worker")
_NO_TALLY: Final = Tally([])

registry.import_families()


def run(sock: socket.socket, links: Iterable[socket.socket] = ()) -> None:
    """Serve the node at the other end of `sock` until it is closed; returns then.

    `links` lead to the other ranks of the model, see `Ranks`.
    """
    try:
        channel = Channel(sock)
        order = channel.next()
        if not isinstance(order, Load):
            raise PeerGone(f"the first order was {type(order).__name__}, not Load")
        ranks = _ranks(order, links)
        heap.keep_buffers()
        try:
            runner = load_model(order, channel, ranks)
        except LoadFailed as error:
            channel.send(LoadRefused(code=error.code, message=error.message))
            return
        heap.settle()
        heap.trim()
        channel.send(Ready(weight_bytes=runner.weight_bytes, cache_bytes=runner.cache_bytes))
        try:
            if order.rank:
                follow(channel, runner, ranks)
            else:
                Loop(channel, runner, make_scheduler(order, runner.shape), ranks).run()
        except RankSilent as silent:
            channel.send(Broken(reason=str(silent), cause="silence"))
    except (PeerGone, RankGone) as gone:  # the node sees itself that a rank has ended
        _log.debug("worker ends: %s", gone)


def _ranks(order: Load, links: Iterable[socket.socket]) -> Ranks:
    watchdog_s = order.options.get("watchdog_s", WATCHDOG_S)
    return Ranks(Share(order.rank, order.world), tuple(links), watchdog_s=watchdog_s)


def follow(channel: Channel, runner: Runner, ranks: Ranks) -> None:
    """On every rank but the first: compute what rank 0 plans, until it ends or a step fails.

    Raises PeerGone, RankGone.
    """
    for plan in ranks.plans():
        for order in channel.arrived():
            if isinstance(order, Threads):
                _set_threads(order, runner)
        try:
            runner.logits(plan)
        except RankGone:
            raise
        except Exception as error:
            _log.exception("a step failed")
            channel.send(Broken(reason=_broken_by(error), cause="step"))
            return


def _set_threads(order: Threads, runner: Runner) -> None:
    torch.set_num_threads(min(order.threads, runner.most_threads or order.threads))


def _broken_by(error: Exception) -> str:
    if out_of_memory(error):
        return "ran out of memory in a step"
    return f"failed ({type(error).__name__}: {error})"


class Loop:
    """Serves sequences with a loaded model until the node leaves or the engine breaks."""

    def __init__(
        self,
        channel: Channel,
        runner: Runner,
        scheduler: Scheduler,
        ranks: Ranks,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._channel = channel
        self._runner = runner
        self._scheduler = scheduler
        self._ranks = ranks
        self._clock = clock

    def run(self) -> None:
        """Returns when the engine is broken; raises PeerGone, RankGone."""
        usable = True
        while usable:
            if self._scheduler.idle:
                self._ranks.rest()
                self._take(self._channel.next())
            for order in self._channel.arrived():
                self._take(order)
            late = self._scheduler.expired()
            if late:
                self._channel.send(Step(outputs=late))
            scheduled = self._scheduler.schedule()
            if scheduled is not None:
                usable = self._step(scheduled)

    def _take(self, order: Order) -> None:
        match order:
            case Cancel():
                self._scheduler.cancel(order.key)
            case Generate():
                refused = self._scheduler.add(order)
                if refused is not None:
                    self._channel.send(Step(outputs=[refused]))
            case Threads():
                _set_threads(order, self._runner)
            case Load():
                raise PeerGone("a second Load came")

    def _step(self, scheduled: Scheduled) -> bool:
        """One step; False if the engine cannot go on. Raises RankGone: its requests are not at fault."""
        began = self._clock()
        reason = None
        try:
            self._ranks.tell(scheduled.plan)
            logits = self._runner.logits(scheduled.plan)
            sampled = _sample(logits, scheduled.sampled)
            if sampled is None:
                reason = "computed values that are not numbers; the weights may be damaged"
                outputs = self._scheduler.fail_all(f"The model {reason}.")
            else:
                outputs = self._scheduler.complete(scheduled, sampled)
        except RankGone:
            raise
        except Exception as error:
            outputs, reason = self._failed(scheduled, error)
        seconds = self._clock() - began
        self._scheduler.took(scheduled, seconds)
        self._channel.send(Step(outputs=outputs, done=self._done(scheduled, seconds)))
        if reason is not None:
            self._channel.send(Broken(reason=reason))
        return reason is None

    def _failed(self, scheduled: Scheduled, error: Exception) -> tuple[list[Output], str | None]:
        """What becomes of the sequences, and why the engine cannot go on if it cannot.

        It goes on after an error of its own on a CPU, where a step leaves nothing behind but the blocks of
        its sequences. It does not after a full memory, with other ranks, which may have done the step, or
        after a CUDA error, after which the driver's state is unknown.
        """
        requests = ", ".join(sequence.request_id for sequence in scheduled.sequences)
        _log.error("a step failed; requests: %s", requests, exc_info=error)
        reason = _broken_by(error)
        what = f"{type(error).__name__}: {error}"
        if out_of_memory(error):
            return self._scheduler.fail_all(f"The model {reason}; a shorter prompt may fit."), reason
        if self._runner.device.type == "cpu" and not self._ranks.others:
            return self._scheduler.fail(scheduled, f"The model failed in this step ({what})."), None
        return self._scheduler.fail_all(f"The model failed in this step ({what})."), reason

    def _done(self, scheduled: Scheduled, seconds: float) -> EngineStep:
        scheduler = self._scheduler
        counts, pool = scheduler.take_counts(), scheduler.pool
        return EngineStep(
            seconds=seconds,
            prefill_tokens=scheduled.prefill,
            decode_tokens=scheduled.decoding + counts.accepted,
            running=scheduler.running,
            waiting=scheduler.waiting,
            cache_used_tokens=pool.held * pool.size,
            cache_total_tokens=pool.blocks * pool.size,
            prefix_queried_tokens=counts.queried,
            prefix_hit_tokens=counts.hit,
            preemptions=counts.preempted,
            draft_tokens=counts.drafted,
            accepted_draft_tokens=counts.accepted,
        )


def _sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled] | None:
    """The next token of each sequence and after each of its draft; None if a row of logits holds no valid
    numbers.
    """
    rows = [_row(sequence, at) for sequence in sequences for at in range(1 + len(sequence.draft))]
    found = sample(logits, rows) if rows else []
    valid = [sampled for sampled in found if sampled is not None]
    return valid if len(valid) == len(found) else None


def _row(sequence: Sequence, ahead: int) -> Row:
    """For its next token but `ahead`."""
    settings = sequence.sampling
    tally = sequence.tally or _NO_TALLY
    return Row(
        settings,
        sequence.draw(ahead) if settings.temperature > 0 else 0.0,
        tally.ids,
        tally.counts,
        withhold=sequence.generated + ahead < settings.min_tokens,
    )
