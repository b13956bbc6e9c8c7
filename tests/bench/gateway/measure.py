"""The runs: starts upstream and gateways, loads them in turn, round after round, and keeps the figures.

All gateways stay up for the whole comparison, and each load visits them one after the other, so that a
slow minute of the machine meets them all. Knows nothing of targets.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import uvloop

from . import exchange, load
from .exchange import Kind
from .gateways import CACHE, Gateway, Launch, NotAvailable, clean_environment, free_ports
from .processes import Child, spent

_START_PATIENCE: Final = 90.0
DIRECT: Final = "direct"
"""Name under which the upstream, asked without any gateway, is measured."""


@dataclass(frozen=True)
class Load:
    """One kind of chat from so many connections."""

    name: str
    kind: Kind
    connections: int
    seconds: float
    """Length of its window in each round."""
    every: float = 0.0
    """Seconds from one question of a connection to its next; 0 asks again as soon as it is answered."""


LOADS: Final = (
    Load("plain", Kind.PLAIN, 8, 2.0, every=0.02),
    Load("burst", Kind.BURST, 8, 2.5, every=0.04),
    Load("paced", Kind.PACED, 8, 3.0),
    Load("single", Kind.PLAIN, 1, 1.0),
    Load("flood", Kind.PLAIN, 8, 1.5),
    Load("burst flood", Kind.BURST, 8, 1.5),
)
"""Costs are compared where all carry the same load: 400 plain requests and 200 bursts a second. In a
flood each runs at a speed of its own, and a fast gateway saves by handling many requests in one turn.
"""


@dataclass
class Figures:
    """One gateway under one load. A list has one entry a round; times in seconds."""

    cpu: list[float] = field(default_factory=list)
    """CPU time an answer of the gateway's whole process tree."""
    p50: list[float] = field(default_factory=list)
    p99: list[float] = field(default_factory=list)
    first_p50: list[float] = field(default_factory=list)
    first_p99: list[float] = field(default_factory=list)
    answers: int = 0
    faults: list[str] = field(default_factory=list)

    def add(self, window: load.Window, cpu: float) -> None:
        self.faults += window.faults
        if not window.whole:
            return
        self.answers += len(window.whole)
        self.cpu.append(cpu / len(window.whole))
        self.p50.append(percentile(window.whole, 0.50))
        self.p99.append(percentile(window.whole, 0.99))
        if window.first:
            self.first_p50.append(percentile(window.first, 0.50))
            self.first_p99.append(percentile(window.first, 0.99))


@dataclass
class Subject:
    """One of the compared, and what was found of it."""

    name: str
    title: str
    port: int = 0
    child: Child | None = None
    missing: str = ""
    """Why there are no figures of it, if there are none."""
    memory: int = 0
    """Resident bytes of its process tree after the runs."""
    figures: dict[str, Figures] = field(default_factory=lambda: {each.name: Figures() for each in LOADS})


def compare(gateways: Sequence[Gateway], rounds: int, scale: float) -> dict[str, Subject]:
    """Measure all gateways and the bare upstream. `scale` stretches the windows.

    Every child has ended on return, whatever happens. Raises NotAvailable if the upstream does not start.
    """
    subjects = [Subject(gateway.name, gateway.title) for gateway in gateways]
    for gateway, subject in zip(gateways, subjects, strict=True):
        try:
            gateway.install()
        except NotAvailable as error:
            subject.missing = str(error)
    folder = CACHE / "work"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as ending:
        upstream = _start_upstream(folder, ending)
        for gateway, subject in zip(gateways, subjects, strict=True):
            if not subject.missing:
                _start(gateway, subject, folder, upstream.port, ending)
        everyone = [upstream, *subjects]
        runner = ending.enter_context(asyncio.Runner(loop_factory=uvloop.new_event_loop))
        for done, (each, subject) in enumerate(_turns(everyone, rounds)):
            _progress(done, rounds * len(LOADS) * len(everyone))
            _visit(runner, each, subject, scale)
        _progress(1, 1)
        for subject in everyone:
            if subject.child is not None and not subject.missing:
                subject.memory = subject.child.resident_bytes()
    return {subject.name: subject for subject in everyone}


def percentile(values: Sequence[float], share: float) -> float:
    """Nearest-rank percentile of at least one value."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def middle(values: Sequence[float]) -> float | None:
    """The median over rounds; None if no round gave a value."""
    return statistics.median(values) if values else None


def _turns(subjects: Sequence[Subject], rounds: int) -> Iterator[tuple[Load, Subject]]:
    for _ in range(rounds):
        for each in LOADS:
            for subject in subjects:
                yield each, subject


def _visit(runner: asyncio.Runner, each: Load, subject: Subject, scale: float) -> None:
    """One window of one load on one subject."""
    child = subject.child
    if child is None or subject.missing:
        return
    before: dict[int, float] = {}

    def mark() -> None:
        before.update(child.cpu_seconds())

    window = runner.run(
        load.apply(subject.port, each.kind, each.connections, each.seconds * scale, each.every, mark)
    )
    subject.figures[each.name].add(window, spent(before, child.cpu_seconds()))
    if not child.alive:
        subject.missing = f"ended during the runs: {child.last_lines()}"


def _start_upstream(folder: Path, ending: contextlib.ExitStack) -> Subject:
    (port,) = free_ports(1)
    subject = Subject(DIRECT, "(asked directly)", port)
    command = [sys.executable, "-m", f"{__package__}.upstream", str(port)]
    env = {**clean_environment(), "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    subject.child = Child(command, env, folder, folder / "upstream.log")
    ending.callback(subject.child.stop)
    _await_answer(subject.child, port)
    return subject


def _start(
    gateway: Gateway, subject: Subject, folder: Path, upstream: int, ending: contextlib.ExitStack
) -> None:
    launch: Launch = gateway.launch(folder, upstream)
    subject.port = launch.port
    try:
        subject.child = Child(
            launch.command, {**clean_environment(), **launch.env}, folder, folder / f"{gateway.name}.log"
        )
        ending.callback(subject.child.stop)
        _await_answer(subject.child, launch.port)
    except (OSError, NotAvailable) as error:
        subject.missing = f"cannot be started: {error}"


def _await_answer(child: Child, port: int) -> None:
    """Return when a plain chat comes back whole. Raises NotAvailable if the child ends or takes too long."""
    patience = time.monotonic() + _START_PATIENCE
    last = "no answer"
    while time.monotonic() < patience:
        if not child.alive:
            raise NotAvailable(f"it ended: {child.last_lines()}")
        try:
            fault = _ask_once(port)
        except (OSError, http.client.HTTPException) as error:
            fault = str(error)
        if fault is None:
            return
        last = fault
        time.sleep(0.1)
    raise NotAvailable(f"no whole answer within {_START_PATIENCE:.0f} s: {last}")


def _ask_once(port: int) -> str | None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        headers = {"content-type": "application/json", "authorization": "Bearer bench"}
        connection.request("POST", "/v1/chat/completions", exchange.request_body(Kind.PLAIN), headers)
        reply = connection.getresponse()
        return exchange.fault(Kind.PLAIN, reply.status, reply.read())
    finally:
        connection.close()


def _progress(done: int, total: int) -> None:
    """A counter on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        text = f"measuring {done + 1}/{total}" if done < total else ""
        print(f"\r{text:<30}\r", end="", file=sys.stderr, flush=True)
