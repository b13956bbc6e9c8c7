"""The worker's loop: read orders, schedule, forward, sample, send; before it, the load.

One model, one process. Ends when the socket does. Importing this module imports torch and all that
a load needs, and runs no torch operation: the warm server imports it before it forks.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

import torch

from cortex.neuron.engine.channel import Channel, PeerGone
from cortex.neuron.engine.messages import (
    Cancel,
    Generate,
    Load,
    LoadProgress,
    LoadRefused,
    Order,
    Output,
    Ready,
    Step,
)
from cortex.neuron.engine.runner import Runner, load_runner
from cortex.neuron.engine.sampler import sample
from cortex.neuron.engine.scheduler import Scheduled, Scheduler
from cortex.neuron.models import registry
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.wire.errors import LoadFailed

MAX_RUNNING: Final = 1
"""Sequences that run at a time."""
PROGRESS_INTERVAL: Final = 0.1
"""Seconds between two reports of a load."""

_log: Final = logging.getLogger("cortex.neuron.worker")

registry.import_families()


def run(sock: socket.socket) -> None:
    """Serve the node at the other end of `sock` until it is closed; returns then."""
    try:
        channel = Channel(sock)
        try:
            runner, scheduler = _start(channel)
        except LoadFailed as error:
            channel.send(LoadRefused(code=error.code, message=error.message))
        else:
            Loop(channel, runner, scheduler).run()
    except PeerGone as gone:
        _log.debug("worker ends: %s", gone)


def _start(channel: Channel) -> tuple[Runner, Scheduler]:
    """Load what the first order names. Raises LoadFailed, PeerGone."""
    order = channel.next()
    if not isinstance(order, Load):
        raise PeerGone(f"the first order was {type(order).__name__}, not Load")
    try:
        # Loading keeps its threads busy with whole parameters; a step splits its operations.
        torch.set_num_threads(1)
        runner, slots = _load(order, channel)
        torch.set_num_threads(order.threads)
    except (LoadFailed, PeerGone):
        raise
    except Exception as error:
        if _out_of_memory(error):
            raise LoadFailed(f"{order.path} does not fit into the memory of {order.device}.") from None
        _log.exception("loading %s failed", order.path)
        raise LoadFailed(f"{order.path} could not be loaded ({type(error).__name__}: {error}).") from None
    channel.send(Ready(weight_bytes=runner.weight_bytes, cache_bytes=runner.cache_bytes))
    scheduler = Scheduler(
        slots=slots,
        context=order.context,
        prefill_chunk=order.prefill_chunk,
        vocab=runner.shape.vocab,
        clock=time.monotonic,
    )
    return runner, scheduler


def _load(order: Load, channel: Channel) -> tuple[Runner, int]:
    """The model and how many sequences its cache holds."""
    slots = min(MAX_RUNNING, order.cache_tokens // max(1, order.context))
    if order.context < 1 or slots < 1 or order.prefill_chunk < 1:
        raise LoadFailed(
            f"A cache of {order.cache_tokens} tokens and chunks of {order.prefill_chunk} "
            f"cannot serve a context of {order.context}."
        )
    if order.world != 1:
        raise LoadFailed(f"The model was ordered over {order.world} devices; this engine uses one.")
    runner = load_runner(
        Path(order.path),
        _placement(order),
        slots=slots,
        context=order.context,
        report=_reporter(channel),
        threads=order.threads,
    )
    return runner, slots


def _placement(order: Load) -> Placement:
    if order.dtype not in ("float32", "packed16"):
        raise LoadFailed(f"The dtype {order.dtype!r} is unknown; float32 and packed16 are known.")
    placement = Placement(torch.device("cpu" if order.device == "cpu" else "cuda"), cast(Dtype, order.dtype))
    if placement.prepacked and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise LoadFailed("packed16 needs FBGEMM, which this build of torch lacks; use dtype float32.")
    return placement


def _reporter(channel: Channel) -> Callable[[int, int], None]:
    """Sends a load's progress now and then; each call notices a closed socket."""
    due = 0.0

    def report(done: int, total: int) -> None:
        nonlocal due
        channel.check()
        now = time.monotonic()
        if now >= due or done == total:
            due = now + PROGRESS_INTERVAL
            channel.send(LoadProgress(phase="weights", done=done, total=total))

    return report


class Loop:
    """Serves sequences with a loaded model until the node leaves or the device is lost."""

    def __init__(self, channel: Channel, runner: Runner, scheduler: Scheduler) -> None:
        self._channel = channel
        self._runner = runner
        self._scheduler = scheduler

    def run(self) -> None:
        """Returns when the device can no longer be used; raises PeerGone."""
        usable = True
        while usable:
            if self._scheduler.idle:
                self._take(self._channel.next())
            for order in self._channel.arrived():
                self._take(order)
            scheduled = self._scheduler.schedule()
            if scheduled is not None:
                usable = self._step(scheduled)

    def _take(self, order: Order) -> None:
        if isinstance(order, Cancel):
            self._scheduler.cancel(order.key)
        elif isinstance(order, Generate):
            refused = self._scheduler.add(order)
            if refused is not None:
                self._channel.send(Step(outputs=[refused]))
        else:
            raise PeerGone("a second Load came")

    def _step(self, scheduled: Scheduled) -> bool:
        """One step; False if the device is lost."""
        try:
            logits = self._runner.logits(scheduled.plan)
            settings = [sequence.sampling for sequence in scheduled.sampled]
            draws = [sequence.draw() for sequence in scheduled.sampled]
            outputs = self._scheduler.complete(scheduled, sample(logits, settings, draws) if settings else [])
        except Exception as error:
            outputs, usable = self._failed(scheduled, error)
        else:
            usable = True
        if outputs:
            self._channel.send(Step(outputs=outputs))
        return usable

    def _failed(self, scheduled: Scheduled, error: Exception) -> tuple[list[Output], bool]:
        """A step holds no state but the slots of its sequences, so the others go on.

        Not so after a CUDA error other than a full memory: the driver's state is unknown then.
        """
        requests = ", ".join(sequence.request_id for sequence in scheduled.sequences)
        _log.error("a step failed; requests: %s", requests, exc_info=error)
        if _out_of_memory(error):
            return self._scheduler.fail(
                scheduled, "The device ran out of memory in this step; a shorter prompt may fit."
            ), True
        message = f"The model failed in this step ({type(error).__name__}: {error})."
        if self._runner.device.type == "cpu":
            return self._scheduler.fail(scheduled, message), True
        return self._scheduler.fail_all(message), False


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
