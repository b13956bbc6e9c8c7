"""A worker: one rank of one model, one process. The load, then the loop, or on other ranks than the first one
what that plans.

Ends when the socket does. Importing this module imports torch and all that a load needs, and runs no torch
operation: the warm server imports it before it forks.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from typing import Final

from cortex.neuron import heap
from cortex.neuron.engine.channel import Channel, PeerGone
from cortex.neuron.engine.loading import load_model, make_scheduler, runs_ahead
from cortex.neuron.engine.loop import Loop, broken_by, set_threads
from cortex.neuron.engine.messages import WATCHDOG_S, Broken, Load, LoadRefused, Ready, Threads
from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.runner import Runner
from cortex.neuron.models import registry
from cortex.neuron.nn.parallel import RankGone, RankSilent
from cortex.neuron.nn.placement import Share
from cortex.wire.errors import LoadFailed

_log: Final = logging.getLogger("cortex.neuron.worker")

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
                scheduler = make_scheduler(order, runner.shape)
                Loop(channel, runner, scheduler, ranks, run_ahead=runs_ahead(order, runner.shape)).run()
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
                set_threads(order, runner)
        try:
            runner.logits(plan)
        except RankGone:
            raise
        except Exception as error:
            _log.exception("a step failed")
            channel.send(Broken(reason=broken_by(error), cause="step"))
            return
