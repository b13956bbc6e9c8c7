"""A worker's loop: read orders, schedule, forward, sample, send.

On the first rank of a loaded model. Knows neither how that was loaded nor what a model is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final, NamedTuple

import torch

from cortex.hookspecs import EngineStep
from cortex.neuron.engine.channel import Channel, PeerGone
from cortex.neuron.engine.loading import out_of_memory
from cortex.neuron.engine.messages import Broken, Cancel, Generate, Load, Order, Output, Step, Threads
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.runner import Runner
from cortex.neuron.engine.sampler import Chosen, Row, choose
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.sequence import Sampled, Sequence, Tally
from cortex.neuron.nn.parallel import RankGone

_log: Final = logging.getLogger("cortex.neuron.worker")
_NO_TALLY: Final = Tally([])


def set_threads(order: Threads, runner: Runner) -> None:
    """As many as the node says, but for those that do not help."""
    torch.set_num_threads(min(order.threads, runner.most_threads or order.threads))


def broken_by(error: Exception) -> str:
    """What it says of a worker that a step failed so."""
    if out_of_memory(error):
        return "ran out of memory in a step"
    return f"failed ({type(error).__name__}: {error})"


class _Flight(NamedTuple):
    """A step on its way: the device works on it, and what it has sampled is not read yet."""

    scheduled: Scheduled
    began: float
    chosen: Chosen | None
    """None where nothing is sampled, or it has failed."""
    error: Exception | None = None


class Loop:
    """Serves sequences with a loaded model until the node leaves or the engine breaks.

    With `run_ahead`, the next step of those who decode is on its way before the last one is read: a device
    that works by itself does not wait for the host then. Whoever ends by what is read has been computed one
    token too far, which is nobody's.
    """

    def __init__(
        self,
        channel: Channel,
        runner: Runner,
        scheduler: Scheduler,
        ranks: Ranks,
        clock: Callable[[], float] = time.perf_counter,
        *,
        run_ahead: bool = False,
    ) -> None:
        self._channel = channel
        self._runner = runner
        self._scheduler = scheduler
        self._ranks = ranks
        self._clock = clock
        self._run_ahead = run_ahead
        self._landed = 0.0
        """When the last step was over."""

    def run(self) -> None:
        """Returns when the engine is broken; raises PeerGone, RankGone."""
        usable = True
        flight: _Flight | None = None
        while usable:
            if flight is None and self._scheduler.idle:
                self._ranks.rest()
                self._take(self._channel.next())
            for order in self._channel.arrived():
                self._take(order)
            late = self._scheduler.expired()
            if late:
                self._channel.send(Step(outputs=late))
            if flight is None:
                scheduled = self._scheduler.schedule()
                if scheduled is None:
                    continue
                flight = self._launch(scheduled)
            next_one = self._follow(flight) if self._run_ahead else None
            usable = self._land(flight)
            flight = next_one

    def _take(self, order: Order) -> None:
        match order:
            case Cancel():
                self._scheduler.cancel(order.key)
            case Generate():
                refused = self._scheduler.add(order)
                if refused is not None:
                    self._channel.send(Step(outputs=[refused]))
            case Threads():
                set_threads(order, self._runner)
            case Load():
                raise PeerGone("a second Load came")

    def _follow(self, flight: _Flight) -> _Flight | None:
        """The next step, set out on before this one is read, if that may be."""
        if flight.chosen is None:
            return None
        scheduled = self._scheduler.follow(flight.scheduled)
        return None if scheduled is None else self._launch(scheduled, flight.chosen.tokens)

    def _launch(self, scheduled: Scheduled, sampled: torch.Tensor | None = None) -> _Flight:
        """`sampled` is what the step before it has sampled, if it follows that. Raises RankGone: its requests
        are not at fault.
        """
        began = self._clock()
        try:
            self._ranks.tell(scheduled.plan)
            logits = self._runner.logits(scheduled.plan, sampled)
            return _Flight(scheduled, began, _choose(logits, scheduled, waits=not self._run_ahead))
        except RankGone:
            raise
        except Exception as error:
            return _Flight(scheduled, began, None, error)

    def _land(self, flight: _Flight) -> bool:
        """Read the step and tell of it; False if the engine cannot go on."""
        scheduled = flight.scheduled
        reason = None
        succeeded = True
        try:
            if flight.error is not None:
                raise flight.error
            sampled = _read(flight.chosen)
            if sampled is None:
                reason = "computed values that are not numbers; the weights may be damaged"
                outputs = self._scheduler.give_up(scheduled, f"The model {reason}.")
            else:
                outputs = self._scheduler.complete(scheduled, sampled)
        except Exception as error:
            succeeded = False
            outputs, reason = self._failed(scheduled, error)
        now = self._clock()
        seconds = now - max(flight.began, self._landed)
        self._landed = now
        if succeeded:  # otherwise it says nothing of what steps take
            self._scheduler.took(scheduled, seconds)
        self._channel.send(Step(outputs=outputs, done=self._done(scheduled, seconds)))
        if reason is not None:
            self._channel.send(Broken(reason=reason))
        return reason is None

    def _failed(self, scheduled: Scheduled, error: Exception) -> tuple[list[Output], str | None]:
        """What becomes of the sequences, and why the engine cannot go on if it cannot.

        It goes on after an error of its own on a CPU, where a step leaves nothing behind but the blocks of
        its sequences. It does not after a full memory, with other ranks, which may have done the step, or
        after a CUDA error, after which the driver's state is unknown. Sequences that were not in the step are
        at fault for none of it; they end with the engine, and may come again.
        """
        requests = ", ".join(sequence.request_id for sequence in scheduled.sequences)
        _log.error("a step failed; requests: %s", requests, exc_info=error)
        reason = broken_by(error)
        what = f"{type(error).__name__}: {error}"
        if out_of_memory(error):
            return self._scheduler.give_up(
                scheduled, f"The model {reason}; a shorter prompt may fit."
            ), reason
        if self._runner.device.type == "cpu" and not self._ranks.others:
            return self._scheduler.fail(scheduled, f"The model failed in this step ({what})."), None
        return self._scheduler.give_up(scheduled, f"The model failed in this step ({what})."), reason

    def _done(self, scheduled: Scheduled, seconds: float) -> EngineStep:
        scheduler = self._scheduler
        counts, pool = scheduler.take_counts(), scheduler.pool
        return EngineStep(
            seconds=seconds,
            prefill_tokens=scheduled.prefill,
            decode_tokens=scheduled.decoding + counts.accepted - counts.wasted,
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


def _choose(logits: torch.Tensor, scheduled: Scheduled, *, waits: bool = True) -> Chosen | None:
    """The next token of each sequence and after each of its draft, if there are any."""
    rows = [
        _row(sequence, scheduled.ahead + at)
        for sequence in scheduled.sampled
        for at in range(1 + len(sequence.draft))
    ]
    return choose(logits, rows, waits=waits) if rows else None


def _read(chosen: Chosen | None) -> list[Sampled] | None:
    """None if a row of logits held no valid numbers."""
    found = chosen.read() if chosen else []
    valid = [sampled for sampled in found if sampled is not None]
    return valid if len(valid) == len(found) else None


def _row(sequence: Sequence, ahead: int) -> Row:
    """For its next token but `ahead`."""
    settings = sequence.sampling
    tally = sequence.tally or _NO_TALLY
    return Row(
        settings,
        sequence.draw(ahead) if settings.temperature > 0 else 0,
        tally.ids,
        tally.counts,
        withhold=sequence.generated + ahead < settings.min_tokens,
    )
