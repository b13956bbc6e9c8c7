"""Starts worker processes: forked from a warm server that has its imports done.

The warm server is multiprocessing's forkserver. It imports what workers need once, so that a worker
starts in milliseconds, and it is started again if it dies. Imports nothing of what it preloads.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Callable, Coroutine, Iterator, Sequence
from multiprocessing import forkserver, util
from multiprocessing.context import ForkServerProcess
from typing import Any, Final

from cortex.neuron import worker_process
from cortex.neuron.worker_process import FINE, WorkerProcess
from cortex.wire.errors import LoadFailed

_context: Final = multiprocessing.get_context("forkserver")
_LEAVINGS: Final = "cortex.neuron.leavings"
_ATTEMPTS: Final = 3
_RETRY_S: Final = 0.05
_LONGEST_FOLDER: Final = 75
"""Bytes of a name to which `/pymp-xxxxxxxx/listener-xxxxxxxx` can be added for a socket of Linux (107)."""

_spawning: Final = threading.Lock()
"""multiprocessing's own books are not made for two threads."""

Target = Callable[..., None]
"""Runs in a worker with its end of the socket and further arguments; found again there by its name."""


class WarmServer:
    """Forks workers that start with `preload` imported."""

    def __init__(
        self,
        preload: Sequence[str],
        target: Target,
        *,
        probe: tuple[Any, ...] = (),
    ) -> None:
        """`probe` are arguments with which the target ends at once and well when its socket is closed."""
        self._preload = list(preload)
        self._target = target
        self._probe = probe

    async def start(self) -> None:
        """Returns when a probe has shown that workers can be forked and have what they need.

        Raises LoadFailed if they cannot.
        """
        _context.set_forkserver_preload([*self._preload, __name__, _LEAVINGS])
        _choose_folder()
        worker = await self.spawn(*self._probe)
        try:
            worker.hang_up()
            end = await worker.ended()
        finally:
            await worker.close()
        if end != FINE:
            raise LoadFailed(
                f"No worker process can run here: the first one {end}; it has told why on standard error. "
                f"An incomplete installation is repaired with: pip install 'helexa-cortex[neuron]'."
            )

    async def spawn(self, *arguments: Any) -> WorkerProcess:
        """A process that runs the target with its end of a socket and `arguments`. Raises LoadFailed.

        Cancelled, it raises when the process that was on its way has ended: until then a thread sends the
        arguments, and sockets among them must stay open.
        """
        spawning = asyncio.ensure_future(self._spawn(arguments))
        try:
            return await asyncio.shield(spawning)
        except asyncio.CancelledError:
            await to_its_end(_undo(spawning))
            raise

    async def _spawn(self, arguments: tuple[Any, ...]) -> WorkerProcess:
        ours, theirs = socket.socketpair()
        try:
            process = await asyncio.to_thread(_start, self._target, theirs, arguments)
        except (OSError, EOFError, RuntimeError) as error:
            ours.close()
            raise LoadFailed(f"No worker process can be started: {error!r}.") from error
        return WorkerProcess(process, *await _opened(process, ours))

    async def stop(self) -> None:
        """End the warm server. Workers must have been closed before; while one lives, so does the server."""
        if not worker_process.alive:
            await asyncio.to_thread(_stop_forkserver)


async def to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` however often the caller is cancelled meanwhile: its memory counts until it is back."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def _start(target: Target, theirs: socket.socket, arguments: tuple[Any, ...]) -> ForkServerProcess:
    """Fork a worker; blocks while a warm server that died is started again. Takes `theirs` over."""
    with theirs, _spawning, _signals_blocked(), _main_hidden():
        for attempt in range(1, _ATTEMPTS + 1):
            process = _context.Process(target=_run, args=(target, theirs, *arguments), daemon=True)
            try:
                process.start()
            except (OSError, EOFError):  # the warm server died just now
                if attempt == _ATTEMPTS:
                    raise
                time.sleep(_RETRY_S)
            else:
                return process
    raise AssertionError("unreachable")


def _run(target: Target, sock: socket.socket, *arguments: Any) -> None:
    """In a worker: let the warm server end as soon as the node does, so that it takes the worker along.

    By itself it would wait for its workers too; one that is busy or hangs would keep both alive.
    """
    keep_alive = forkserver._forkserver._forkserver_alive_fd  # type: ignore[attr-defined]
    if keep_alive is not None:
        os.close(keep_alive)
        forkserver._forkserver._forkserver_alive_fd = None  # type: ignore[attr-defined]
    target(sock, *arguments)


async def _opened(
    process: ForkServerProcess, sock: socket.socket
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    sock.setblocking(False)
    try:
        return await asyncio.open_unix_connection(sock=sock)
    except BaseException:
        process.kill()
        sock.close()
        raise


async def _undo(spawning: asyncio.Future[WorkerProcess]) -> None:
    with contextlib.suppress(LoadFailed):
        await (await spawning).close()


def _choose_folder() -> None:
    """Where TMPDIR is too long for a socket in it, multiprocessing's folder is one in /tmp for this process.

    By itself it fails then, up to Python 3.13.
    """
    if len(os.fsencode(tempfile.gettempdir())) > _LONGEST_FOLDER:
        usual, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            with contextlib.suppress(OSError):  # then starting a worker says what cannot be done
                util.get_temp_dir()
        finally:
            tempfile.tempdir = usual


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    """What is started inside never sees SIGINT or SIGTERM: a Ctrl-C in the terminal goes to the whole
    process group, and it is for this process to end the others in order.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def _main_hidden() -> Iterator[None]:
    """Keep workers from importing this program's main module: they have no use for a command line."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _stop_forkserver() -> None:
    """multiprocessing leaves its server running until this process ends, and has no public way to stop it.

    It is killed, so that it does not look whether this process has ended, and left something behind.
    """
    with _spawning:
        server: Any = forkserver._forkserver
        if server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()
