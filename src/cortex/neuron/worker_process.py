"""The handle of one worker process: messages both ways, its end noticed, and the power to end it.

Knows the framing of messages, not their meaning. How a process comes to be is `processes`' business.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import signal
import weakref
from collections.abc import AsyncIterator
from multiprocessing.context import ForkServerProcess
from typing import Final

import msgspec

from cortex.neuron.engine.messages import Order, Report, Unframer, decode_report, frame

_READ: Final = 2**16
_UNKNOWN: Final = 255
"""What multiprocessing gives as the exit code when the warm server died before it could tell."""
FINE: Final = "ended by itself"
"""How a worker ended that was no longer needed."""

alive: Final[weakref.WeakSet[WorkerProcess]] = weakref.WeakSet()
"""Workers that have not been closed."""


class WorkerProcess:
    """A running worker. Its owner calls `close` once, which ends it however it is."""

    def __init__(
        self, process: ForkServerProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        assert process.pid is not None
        self.pid: int = process.pid
        self._handle = _pid_handle(process.pid)
        self._process = process
        self._reader = reader
        self._writer = writer
        self._exit = asyncio.ensure_future(self._wait())
        alive.add(self)

    async def send(self, order: Order) -> None:
        """Waits while the worker's socket is full. Raises OSError if the worker is gone."""
        self.post(order)
        await self._writer.drain()

    def post(self, order: Order) -> None:
        """Send something small without waiting; to a worker that is gone it is lost."""
        if not self._writer.is_closing():  # uvloop would raise
            self._writer.write(frame(order))

    async def reports(self) -> AsyncIterator[Report]:
        """What the worker says until its socket closes, which it does when the worker ends.

        Raises ValueError on what is no report.
        """
        unframer = Unframer()
        while data := await self._read():
            for body in unframer.feed(data):
                try:
                    yield decode_report(body)
                except msgspec.DecodeError as error:
                    raise ValueError(f"not a report: {error}") from None

    def hang_up(self) -> None:
        """Nothing more will be sent: an idle worker ends by itself."""
        self._writer.write_eof()

    async def ended(self) -> str:
        """Waits for the end of the process and tells it in words that follow "it"."""
        return _in_words(await asyncio.shield(self._exit))

    async def ends_within(self, seconds: float) -> bool:
        """Waits at most so long for the end of the process."""
        done, _ = await asyncio.wait([self._exit], timeout=seconds)
        return bool(done)

    def kill(self) -> None:
        if self._handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def close(self) -> None:
        """End the process; returns when it is gone and its memory is back."""
        self.kill()
        await asyncio.shield(self._exit)
        alive.discard(self)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> bytes:
        try:
            return await self._reader.read(_READ)
        except OSError:
            return b""

    async def _wait(self) -> int:
        """The process's end, seen by the kernel's own handle; the warm server tells the exit code.

        A warm server that dies takes its workers along. One that was too young to be tied to it yet is
        killed here, so that nothing runs which nobody could reap.
        """
        told = asyncio.ensure_future(_readable(self._process.sentinel))
        if self._handle is not None:
            gone = asyncio.ensure_future(_readable(self._handle))
            await asyncio.wait([told, gone], return_when=asyncio.FIRST_COMPLETED)
            if not gone.done() and self._process.exitcode == _UNKNOWN:
                self.kill()
            await gone
            os.close(self._handle)
            self._handle = None
        await told
        code = self._process.exitcode
        self._process.close()
        return _UNKNOWN if code is None else code


def _pid_handle(pid: int) -> int | None:
    """The kernel's handle of a process, which no later process can be mistaken for; None if it is gone."""
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _in_words(code: int) -> str:
    if code == _UNKNOWN:
        return "ended with the warm server"
    if code == -signal.SIGKILL:
        return "was killed (SIGKILL; the kernel does that when memory runs out)"
    if code < 0:
        named = -code in set(signal.Signals)
        return f"was killed by {signal.Signals(-code).name if named else f'signal {-code}'}"
    return FINE if code == 0 else f"ended with exit code {code}"


@atexit.register
def _kill_all() -> None:
    """multiprocessing waits for its children at exit, and workers heed no SIGTERM."""
    for worker in list(alive):
        worker.kill()
