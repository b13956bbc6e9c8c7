"""`cortex serve` and `cortex neuron`: one daemon in this process, from its configuration to a clean end."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import click

from cortex.cli.failure import Failure, Misuse
from cortex.cli.logs import log_to
from cortex.cli.notify import READY, STOPPING, notify

if TYPE_CHECKING:
    from cortex.web.asgi import ASGIApp

GC_THRESHOLD: Final = 10_000
"""New container objects between two looks of the garbage collector; Python's default is 700."""

log: Final = logging.getLogger("cortex.daemon")

config_option = click.option(
    "-c",
    "--config",
    "path",
    type=click.Path(path_type=Path),
    help="The configuration file; without it, defaults and environment.",
)


class Daemon(NamedTuple):
    """What runs: background work that is started and stopped once, and who listens where."""

    name: str
    start: Callable[[], Awaitable[None]]
    stop: Callable[[], Awaitable[None]]
    listeners: Sequence[tuple[str, ASGIApp]]
    cut: Callable[[], None]
    """Ends what has had its time to end, and tells those who wait for it."""
    drain: Callable[[], None] | None = None
    """Refuses what is new while what runs may end; without it nobody is listened to any more by then."""


@click.command("serve")
@config_option
def serve_command(path: Path | None) -> None:
    """Run the gateway until SIGTERM or Ctrl-C."""
    from cortex.config import load_gateway, load_models
    from cortex.gateway.app import build_gateway

    def build() -> Daemon:
        config = load_gateway(path)
        gateway = build_gateway(config, load_models(config, path))
        section = config.gateway
        listeners = [(section.listen, gateway.app), (section.metrics_listen, gateway.metrics_app)]
        return Daemon("gateway", gateway.start, gateway.stop, listeners, gateway.cut)

    run_daemon(build)


@click.command("neuron")
@config_option
def neuron_command(path: Path | None) -> None:
    """Run the node daemon until SIGTERM or Ctrl-C."""
    from cortex.config import load_neuron

    try:
        from cortex.neuron.app import build_neuron
    except ModuleNotFoundError as error:
        raise Failure(
            f"a neuron needs {error.name}, which is not here; pip install 'helexa-cortex[neuron]'."
        ) from None

    def build() -> Daemon:
        config = load_neuron(path)
        neuron = build_neuron(config)
        listeners = [(config.listen, neuron.app)]
        return Daemon("neuron", neuron.start, neuron.stop, listeners, neuron.cut, neuron.drain)

    run_daemon(build)


def run_daemon(build: Callable[[], Daemon]) -> None:
    """Runs until a signal, drains, returns. Raises Failure where it could not start."""
    import uvloop

    from cortex.config import ConfigError
    from cortex.plugins import PluginError
    from cortex.web.server import BindError
    from cortex.wire.errors import CortexError

    log_to()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_live(build))
    except ConfigError as error:
        raise Misuse(str(error)) from None
    except (BindError, PluginError, CortexError) as error:
        raise Failure(str(error)) from None


def _calm_the_collector() -> None:
    """What start-up made lives as long as the daemon, and a request's objects end by their counts: looking
    at them again and again is a good part of what a small request costs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 50)


async def _live(build: Callable[[], Daemon]) -> None:
    from cortex.web.server import bind_all, serve

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stop)
    daemon = build()
    for sock in bind_all([bind for bind, _ in daemon.listeners]):
        sock.close()  # only tried: a port in use must be told before anything slow begins

    def ready(addresses: list[str]) -> None:
        _calm_the_collector()
        log.info("listening service=%s addresses=%s", daemon.name, ",".join(addresses))
        notify(READY, f"STATUS=listening on {', '.join(addresses)}")

    try:
        if await finished_before(stop, daemon.start()):
            await serve(daemon.listeners, stop=stop, on_ready=ready, on_stop=daemon.drain, cut=daemon.cut)
    finally:
        notify(STOPPING)
        await daemon.stop()
        log.info("ended service=%s", daemon.name)


def _on_signal(number: signal.Signals, stop: asyncio.Event) -> None:
    """The first signal asks for a clean end, a second one ends at once as if nobody had caught it."""
    if stop.is_set():
        asyncio.get_running_loop().remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    log.info("stopping signal=%s, a second one ends at once", number.name)
    stop.set()


async def finished_before(stop: asyncio.Event, work: Awaitable[object]) -> bool:
    """True if `work` ended first; else it is cancelled. Raises what `work` raises."""
    task = asyncio.ensure_future(work)
    halt = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, halt}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
            return True
        return False
    finally:
        halt.cancel()
        task.cancel()
        await asyncio.gather(task, halt, return_exceptions=True)
