"""Daemons of ours as child processes that cannot outlive us, not even when we are killed.

Each child dies with its parent (PR_SET_PDEATHSIG), tells when it is ready (NOTIFY_SOCKET), has a
process group of its own and a log file. Knows nothing of what the children do. Linux only.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from cortex.cli.failure import Failure
from cortex.cli.notify import READY, Listener

PR_SET_PDEATHSIG: Final = 1
LAST_LINES: Final = 12
TAIL_BYTES: Final = 16384

_libc: Final = ctypes.CDLL(None)


class Child:
    def __init__(
        self, name: str, process: asyncio.subprocess.Process, ear: Listener, log: Path | None
    ) -> None:
        self.name = name
        self.pid = process.pid
        self._process = process
        self._ear = ear
        self._log = log

    async def ready(self) -> None:
        """Waits until the child says that it serves. Never returns if it dies first."""
        loop = asyncio.get_running_loop()
        said: asyncio.Future[None] = loop.create_future()

        def hear() -> None:
            if READY in self._ear.take() and not said.done():
                said.set_result(None)

        loop.add_reader(self._ear.fileno(), hear)
        try:
            await said
        finally:
            loop.remove_reader(self._ear.fileno())

    async def ended(self) -> int:
        """Waits for the end; the exit status, negative for a signal."""
        return await self._process.wait()

    def obituary(self) -> Failure:
        """Why it is over, with the last lines of its log."""
        code = self._process.returncode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        if self._log is None:
            return Failure(f"the {self.name} {how}.")
        return Failure(
            f"the {self.name} {how}; all it said is in {self._log}, at last:", more=_tail(self._log)
        )

    async def stop(self, grace_s: float) -> None:
        """SIGTERM, then after `grace_s` SIGKILL; returns when it and its process group are gone."""
        if self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.terminate()
            with suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self._process.wait()
        self.kill()
        await self._process.wait()
        self._ear.close()

    def kill(self) -> None:
        """SIGKILL to whatever is left of it."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)


async def start_child(
    name: str, command: Sequence[str], environment: Mapping[str, str], log: Path | None
) -> Child:
    """Starts `command`; its output goes to `log`, emptied first, or to our stderr without one.

    Must be called in the main thread: a child dies with the thread that made it. Raises Failure.
    """
    ear = Listener()
    try:
        with Path(log or os.devnull).open("wb") as file:  # noqa: ASYNC230 - local, and once
            process = await asyncio.create_subprocess_exec(
                *command,
                env={**environment, "NOTIFY_SOCKET": ear.variable},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file if log else 2,
                stderr=file if log else 2,
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()),
            )
    except OSError as error:
        ear.close()
        raise Failure(f"cannot start the {name}: {error}.") from None
    return Child(name, process, ear, log)


async def first_end(children: Iterable[Child]) -> Child:
    """Waits until one of them ends by itself."""
    tasks = {asyncio.create_task(child.ended()): child for child in children}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[done.pop()]
    finally:
        for task in tasks:
            task.cancel()


def _die_with(parent: int) -> Callable[[], None]:
    def between_fork_and_exec() -> None:
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the line above
            os._exit(1)

    return between_fork_and_exec


def _tail(log: Path) -> list[str]:
    try:
        with open(log, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if line.strip()][-LAST_LINES:]
