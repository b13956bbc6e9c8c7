"""The parent's side of an engine's process: starts it, orders, reads its memory, ends it for certain.

Orders and answers are JSON lines. Knows no engine. Linux only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any, Final

from .models import ROOT

LOGS: Final = ROOT / ".cache" / "bench"
PROMPT_LOOKUP: Final = "BENCH_PROMPT_LOOKUP"
"""The variable of the environment that is `off` where ours are to compute no drafts."""
_LINE: Final = 2**24
_GRACE: Final = 5.0
"""Seconds that a process may take to end once its input has ended."""


class Failed(Exception):
    """An engine is not there, ended, or answered with an error; the message says which."""


class Subject:
    """One engine in a process of its own."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, name: str) -> Subject:
        LOGS.mkdir(parents=True, exist_ok=True)
        log = LOGS / f"engine-{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                f"{__package__}.child",
                name,
                env=environment(),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=output,
                limit=_LINE,
                start_new_session=True,
            )
        return cls(name, process, log)

    async def ask(self, order: str, patience: float, **arguments: Any) -> dict[str, Any]:
        """The answer, and as `foreign` how many cores other programs had meanwhile.

        Raises Failed; after `patience` seconds without an answer the process is killed.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = b""
        before, started = self._foreign_seconds(), time.monotonic()
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(json.dumps({"order": order, **arguments}).encode() + b"\n")
            await self._process.stdin.drain()
            try:
                line = await asyncio.wait_for(self._process.stdout.readline(), patience)
            except TimeoutError:
                self._signal(signal.SIGKILL)
                raise Failed(f"no answer to {order} within {patience:.0f} s") from None
        if not line:
            raise Failed(f"its process ended during {order}: {self._last_lines()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Failed(f"{order}: {answer['error']}")
        answer["foreign"] = (self._foreign_seconds() - before) / (time.monotonic() - started)
        return answer

    def memory(self) -> dict[str, int]:
        """Bytes of the process and all that descend from it: `rss`, and `pss` where shared pages are shared
        out among those who map them.
        """
        total = {"rss": 0, "pss": 0}
        for pid in self._tree():
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    name, _, rest = line.partition(":")
                    if name.lower() in total:
                        total[name.lower()] += int(rest.split()[0]) * 1024
        return total

    async def end(self) -> None:
        """By itself, as its input ends; else by force, with all that descends from it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            await asyncio.wait_for(self._process.wait(), _GRACE)
        except TimeoutError:
            pass
        finally:
            self._signal(signal.SIGKILL)
            await self._process.wait()

    def _foreign_seconds(self) -> float:
        """CPU seconds so far of all that is not this subject; the host's own use of the cores included."""
        fields = list(map(int, Path("/proc/stat").read_text().split(maxsplit=9)[1:9]))
        ticks = sum(fields) - fields[3] - fields[4]  # all but idle and waiting for a disk
        for pid in self._tree():
            with contextlib.suppress(OSError):
                after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks -= int(after_name[11]) + int(after_name[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def _tree(self) -> list[int]:
        found = [self._process.pid]
        for pid in found:
            with contextlib.suppress(OSError):
                for thread in Path(f"/proc/{pid}/task").iterdir():
                    found += map(int, (thread / "children").read_text().split())
        return found

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_lines(self, count: int = 3) -> str:
        lines = self._log.read_text(errors="replace").split("\n")
        return " / ".join([line.strip() for line in lines if line.strip()][-count:])


def environment() -> dict[str, str]:
    """This one without settings that would bend the comparison."""
    unwanted = ("CORTEX_", "NEURON_", "PYTHON", "OMP_", "GOMP_", "MKL_", "LLAMA_", "GGML_", "RAYON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests" / "bench"), str(ROOT / "src")])}
