"""Child processes: started on a log file, measured with all their descendants, ended for certain.

CPU time is the kernel's own clock of a process (user and system, nanoseconds, ended threads included),
memory the resident set of /proc. Knows nothing of gateways. Linux only.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

_SET_PDEATHSIG: Final = 1
_GRACE: Final = 8.0
"""Seconds between asking a child to end and killing it."""
_libc: Final = ctypes.CDLL(None)


class Child:
    """A process that leads a group of its own, so that Ctrl-C reaches only the benchmark itself."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self.log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def tree(self) -> list[int]:
        """Process ids of the child and all its descendants that live."""
        found = [self._process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (thread / "children").read_text().split())
        return found

    def cpu_seconds(self) -> dict[int, float]:
        """CPU time of each process of the tree so far."""
        seconds = {}
        for pid in self.tree():
            with contextlib.suppress(OSError):
                seconds[pid] = time.clock_gettime(_cpu_clock(pid))
        return seconds

    def resident_bytes(self) -> int:
        """Resident memory of the tree; pages that two processes share count twice."""
        total = 0
        for pid in self.tree():
            with contextlib.suppress(OSError):
                total += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return total * os.sysconf("SC_PAGE_SIZE")

    def stop(self) -> None:
        """End the whole group; returns when the child is gone."""
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE)
        self._signal(signal.SIGKILL)
        self._process.wait()

    def last_lines(self, count: int = 3) -> str:
        """The end of what the child wrote, on one line."""
        lines = self.log.read_text(errors="replace").split("\n")
        return " / ".join([line.strip() for line in lines if line.strip()][-count:])

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def spent(before: Mapping[int, float], after: Mapping[int, float]) -> float:
    """CPU seconds between two readings; a process that came in between counts from its start."""
    return sum(seconds - before.get(pid, 0.0) for pid, seconds in after.items())


def _cpu_clock(pid: int) -> int:
    """The clock id of another process, as clock_getcpuclockid(3) computes it."""
    return (~pid << 3) | 2


def _end_with_parent() -> None:
    """Runs in the child before exec: the kernel ends it should the benchmark be killed."""
    _libc.prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
