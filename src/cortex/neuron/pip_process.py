"""Downloads one wheel by running pip, or uv's pip where there is none, as a process of its own.

pip reads its own configuration for where to look. The process ends with its caller, however that ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from cortex.wire.errors import LoadFailed

_OPTIONS: Final = (
    *("download", "--no-deps", "--only-binary", ":all:", "--no-cache-dir"),
    *("--no-input", "--disable-pip-version-check", "--progress-bar", "off"),
)
_MEASURE_S: Final = 0.25
_TAIL_LINES: Final = 40
_UNITS: Final = {"bytes": 1, "kB": 1000, "MB": 1000**2, "GB": 1000**3}
_SIZE: Final = re.compile(r"Downloading .*\(([\d.]+) (bytes|kB|MB|GB)\)")

TIED: Final = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
if os.getppid() == int(sys.argv[1]):
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes the given program, killed by the kernel when the process that started it dies."""


def command() -> list[str]:
    """How to run pip here. Raises LoadFailed if there is neither pip nor uv."""
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-P", "-m", "pip"]
    for name, arguments in (("pip3", []), ("pip", []), ("uv", ["tool", "run", "pip"])):
        path = shutil.which(name)
        if path:
            return [path, *arguments]
    raise LoadFailed("Fetching wheels takes pip or uv, and this node has neither on its PATH.")


async def download(
    pip: Sequence[str], requirement: str, folder: Path, tell: Callable[[int, int], None]
) -> None:
    """Fetch the wheel of `requirement` into `folder`. `tell` gets bytes done and bytes in all (0: unknown).

    Nothing is installed or executed. Temporary files lie under `folder` too. Cancelling kills pip.
    Raises LoadFailed with pip's own words.
    """
    scratch = folder / "scratch"
    scratch.mkdir(parents=True)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TIED, str(os.getpid())),
        *(*pip, *_OPTIONS, "--dest", str(folder), requirement),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"},
        start_new_session=True,
    )
    try:
        lines = await _follow(process, scratch, tell)
        if await process.wait() != 0:
            raise LoadFailed(f"pip could not fetch {requirement}: {_complaint(lines)}")
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


async def _follow(
    process: asyncio.subprocess.Process, scratch: Path, tell: Callable[[int, int], None]
) -> list[str]:
    """Read pip's output to its end and give its last lines; tell how far the download is meanwhile."""
    assert process.stdout is not None
    lines: list[str] = []
    total = 0
    while True:
        try:
            raw = await asyncio.wait_for(process.stdout.readline(), _MEASURE_S)
        except TimeoutError:
            done = _largest_file(scratch)
            tell(done, max(done, total) if total else 0)
            continue
        except ValueError:
            continue  # a line longer than the reader's buffer, which has been dropped
        if not raw:
            return lines
        line = raw.decode("utf-8", "replace").strip()
        lines = [*lines[1 - _TAIL_LINES :], line]
        found = _SIZE.search(line)
        if found:
            total = int(float(found[1]) * _UNITS[found[2]])
            tell(0, total)


def _largest_file(folder: Path) -> int:
    """Bytes of the wheel that pip is writing: the largest of its temporary files by far."""
    sizes = [0]
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            sizes.append(path.stat().st_size)
    return max(sizes)


def _complaint(lines: Sequence[str]) -> str:
    """What pip says went wrong, without credentials that a URL in it may hold."""
    if any("No space left on device" in line for line in lines):
        return "the disk is full; make room and load again."
    errors = [line for line in lines if line.startswith("ERROR:")] or list(lines[-3:])
    text = " ".join(line.removeprefix("ERROR:").strip() for line in errors) or "it said nothing."
    return re.sub(r"//[^/@\s]+@", "//", text)
