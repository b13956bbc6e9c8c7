"""How far a load is, for a terminal (one moving line) and for a log (a line now and then).

Both show what a Meter reads off the node's progress reports; the clock is injected. Knows nothing of
where the reports come from.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable
from typing import IO, TYPE_CHECKING, Final, NamedTuple, Protocol

from cortex.wire.node import Progress

if TYPE_CHECKING:
    from rich.console import Console

RATE_WINDOW_S: Final = 10.0
PLAIN_EVERY_S: Final = 5.0
MIN_RATE_S: Final = 0.5
"""A rate over less than this is noise."""

Clock = Callable[[], float]


class Reading(NamedTuple):
    """What can be said about one phase: `fraction` is None where the total is unknown."""

    phase: str
    fraction: float | None
    text: str


class Meter:
    """Turns progress reports of one phase after the other into readings with rate and time left."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._phase: str | None = None
        self._samples: deque[tuple[float, int]] = deque()

    def read(self, progress: Progress) -> Reading:
        now = self._clock()
        if progress.phase != self._phase or (self._samples and progress.done < self._samples[-1][1]):
            self._phase = progress.phase
            self._samples.clear()
        self._samples.append((now, progress.done))
        while len(self._samples) > 2 and now - self._samples[0][0] > RATE_WINDOW_S:
            self._samples.popleft()
        parts = []
        if progress.total > 0:
            parts.append(f"{100 * min(progress.done, progress.total) // progress.total} %")
            parts.append(f"{amount(progress.done, progress.unit)} of {amount(progress.total, progress.unit)}")
        elif progress.done:
            parts.append(amount(progress.done, progress.unit))
        rate = self._rate(now)
        if rate:
            parts.append(f"{amount(round(rate), progress.unit)}/s")
            if progress.total > progress.done:
                parts.append(f"{duration((progress.total - progress.done) / rate)} left")
        fraction = min(1.0, progress.done / progress.total) if progress.total > 0 else None
        return Reading(progress.phase, fraction, ", ".join(parts))

    def _rate(self, now: float) -> float | None:
        start, done = self._samples[0]
        if now - start < MIN_RATE_S:
            return None
        return (self._samples[-1][1] - done) / (now - start)


def amount(value: int, unit: str) -> str:
    """`31.4 MB`, `12 layers`."""
    if unit != "bytes":
        return f"{value} {unit}"
    if value >= 10**9:
        return f"{value / 10**9:.2f} GB"
    return f"{value / 10**6:.1f} MB" if value >= 10**5 else f"{value / 1000:.1f} kB"


def duration(seconds: float) -> str:
    """`8 s`, `1 min 05 s`, `2 h 10 min`."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class ProgressView(Protocol):
    def show(self, progress: Progress) -> None: ...

    def close(self) -> None:
        """Leaves the screen as it should stay. May be called more than once."""


class PlainProgress:
    """A line when a phase begins and ends, and every few seconds between."""

    def __init__(self, out: IO[str], clock: Clock = time.monotonic) -> None:
        self._out = out
        self._clock = clock
        self._meter = Meter(clock)
        self._phase: str | None = None
        self._complete = False
        self._written_at = 0.0

    def show(self, progress: Progress) -> None:
        reading = self._meter.read(progress)
        now = self._clock()
        begins = reading.phase != self._phase
        completes = reading.fraction == 1.0 and not self._complete
        if not (begins or completes or (now - self._written_at >= PLAIN_EVERY_S and not self._complete)):
            return
        self._phase, self._written_at, self._complete = reading.phase, now, reading.fraction == 1.0
        self._out.write(f"{reading.phase}: {reading.text}\n" if reading.text else f"{reading.phase}\n")
        self._out.flush()

    def close(self) -> None:
        self._out.flush()


class TerminalProgress:
    """A bar, redrawn in place and gone when closed."""

    def __init__(self, console: Console, clock: Clock = time.monotonic, animate: bool = True) -> None:
        from rich.progress import BarColumn, SpinnerColumn, TextColumn
        from rich.progress import Progress as Bars

        self._meter = Meter(clock)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}", markup=False),
            console=console,
            get_time=clock,
            auto_refresh=animate,
            transient=True,
        )
        self._phase: str | None = None
        self._started = False

    def show(self, progress: Progress) -> None:
        reading = self._meter.read(progress)
        if reading.phase != self._phase:
            # A task cannot become indeterminate again, so each phase has its own.
            for task in self._bars.task_ids:
                self._bars.remove_task(task)
            self._task = self._bars.add_task(reading.phase, total=None, text="")
            self._phase = reading.phase
        total = None if reading.fraction is None else 1.0
        self._bars.update(self._task, total=total, completed=reading.fraction or 0.0, text=reading.text)
        if not self._started:
            self._started = True
            self._bars.start()
        self._bars.refresh()

    def close(self) -> None:
        if self._started:
            self._started = False
            self._bars.stop()


def progress_view(out: IO[str] | None = None) -> ProgressView:
    """The view that suits `out` (default: stderr)."""
    target = out or sys.stderr
    if not target.isatty():
        return PlainProgress(target)
    from rich.console import Console

    return TerminalProgress(Console(file=target))
