from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from cortex.neuron import processes
from cortex.neuron.engine.messages import Cancel, LoadProgress, Step
from cortex.neuron.processes import Target, WarmServer
from cortex.testing.clock import settle
from cortex.wire.errors import LoadFailed

pytestmark = pytest.mark.slow

WORKERS = '''
import ctypes, os, socket, sys, time
from cortex.neuron.engine.messages import LoadProgress, Output, Step, Unframer, decode_order, frame

def tie():
    ctypes.CDLL(None).prctl(1, 9)

def echo(sock, word="", tied=True, link=None):
    if tied:
        tie()
    sock.sendall(frame(LoadProgress(phase=f"{word}:{'colorsys' in sys.modules}", done=os.getppid(), total=0)))
    unframer = Unframer()
    while data := sock.recv(65536):
        for body in unframer.feed(data):
            key = decode_order(body).key
            if key == 13:
                os._exit(3)
            sock.sendall(frame(Step(outputs=[Output(key=key, ids=[os.getpid()])])))

def busy(sock, probed=False):
    """Looks at nothing, like a kernel that hangs."""
    if probed:
        return
    tie()
    sock.sendall(frame(LoadProgress(phase="busy", done=os.getpid(), total=os.getppid())))
    time.sleep(600)

def lacks_a_module(sock):
    sys.exit(1)

def garbage(sock):
    sock.sendall(bytes([5, 0, 0, 0]) + b"hello")
'''

Load = Callable[[str], Target]


@pytest.fixture
def workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Targets in a module that worker processes can import."""
    (tmp_path / "node_test_workers.py").write_text(WORKERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "node_test_workers", raising=False)
    module = __import__("node_test_workers")
    return lambda name: getattr(module, name)


@pytest.fixture
async def warm(workers: Load) -> AsyncIterator[WarmServer]:
    server = WarmServer(["colorsys"], workers("echo"))
    await server.start()
    yield server
    await server.stop()
    assert not [child for child in psutil.Process().children() if "forkserver" in " ".join(child.cmdline())]


def runs(pid: int) -> bool:
    """A zombie does not run: what is left of it waits for its parent, which may be the system's init."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


async def test_a_worker_answers_and_is_gone_when_closed(warm: WarmServer) -> None:
    worker = await warm.spawn("hello")
    reports = worker.reports()
    first = await anext(reports)
    assert isinstance(first, LoadProgress)
    assert first.phase == "hello:True", "the preloaded module is there"
    await worker.send(Cancel(key=7))
    step = await anext(reports)
    assert isinstance(step, Step)
    assert (step.outputs[0].key, step.outputs[0].ids) == (7, [worker.pid])
    await worker.close()
    assert not runs(worker.pid)
    assert "SIGKILL" in await worker.ended()
    with pytest.raises(StopAsyncIteration):
        await anext(reports)


async def test_a_worker_that_ends_is_noticed_with_its_cause(warm: WarmServer) -> None:
    by_itself, by_signal = await warm.spawn(), await warm.spawn()
    await by_itself.send(Cancel(key=13))
    assert await by_itself.ended() == "ended with exit code 3"
    os.kill(by_signal.pid, signal.SIGKILL)
    assert "SIGKILL" in await by_signal.ended()
    await anext(by_itself.reports())
    assert [report async for report in by_itself.reports()] == []
    with pytest.raises(OSError):  # noqa: PT011
        await by_itself.send(Cancel(key=1))
    await by_itself.close()
    await by_signal.close()
    nameless = await warm.spawn()
    os.kill(nameless.pid, signal.SIGRTMIN + 6)
    assert await nameless.ended() == f"was killed by signal {signal.SIGRTMIN + 6}"
    await nameless.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_what_is_sent_to_a_worker_that_is_gone_is_lost_whatever_the_loop(workers: Load, run: Any) -> None:
    async def main() -> None:
        warm = WarmServer([], workers("echo"))
        worker = await warm.spawn()
        await anext(worker.reports())
        worker.kill()
        await worker.ended()
        for _ in range(3):
            worker.post(Cancel(key=1))
            with pytest.raises(OSError, match=r"lost|pipe"):
                await worker.send(Cancel(key=2))
        await worker.close()
        await warm.stop()

    run(main())


async def test_what_is_no_report_ends_the_conversation(workers: Load) -> None:
    server = WarmServer([], workers("garbage"))
    worker = await server.spawn()
    with pytest.raises(ValueError, match="not a report"):
        await anext(worker.reports())
    await worker.close()
    await server.stop()


async def test_workers_that_cannot_run_are_told_before_anything_is_served(workers: Load) -> None:
    server = WarmServer([], workers("lacks_a_module"))
    with pytest.raises(LoadFailed, match=r"ended with exit code 1.*helexa-cortex\[neuron\]"):
        await server.start()
    await server.stop()


@pytest.mark.parametrize("tied", [True, False])
async def test_a_warm_server_that_dies_takes_its_workers_and_is_replaced(
    warm: WarmServer, tied: bool
) -> None:
    worker = await warm.spawn("old", tied)
    first = await anext(worker.reports())
    assert isinstance(first, LoadProgress)
    os.kill(first.done, signal.SIGKILL)
    assert "warm server" in await worker.ended()
    assert not runs(worker.pid)
    await worker.close()
    replacement = await warm.spawn("new")
    second = await anext(replacement.reports())
    assert isinstance(second, LoadProgress)
    assert second.phase == "new:True", "the new server has preloaded too"
    assert second.done != first.done
    await replacement.close()


async def test_the_warm_server_heeds_no_terminal_signal(warm: WarmServer) -> None:
    worker = await warm.spawn()
    first = await anext(worker.reports())
    assert isinstance(first, LoadProgress)
    os.kill(first.done, signal.SIGTERM)
    os.kill(first.done, signal.SIGINT)
    os.kill(worker.pid, signal.SIGTERM)
    another = await warm.spawn()
    second = await anext(another.reports())
    assert isinstance(second, LoadProgress)
    assert second.done == first.done
    await worker.close()
    await another.close()


async def test_a_cancelled_spawn_leaves_no_process(warm: WarmServer) -> None:
    first = await warm.spawn()
    report = await anext(first.reports())
    assert isinstance(report, LoadProgress)
    server = psutil.Process(report.done)
    for steps in range(6):
        task = asyncio.create_task(warm.spawn())
        for _ in range(steps):
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await first.close()
    last = await warm.spawn()  # forks are served in order: when this one runs, the cancelled ones did
    await anext(last.reports())
    await last.close()
    _, remaining = await asyncio.to_thread(psutil.wait_procs, server.children(), 5)
    assert not remaining


async def test_a_spawn_that_is_cancelled_lets_what_it_sends_be_sent(
    warm: WarmServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller closes the sockets among the arguments then; their numbers may soon be somebody else's."""
    may_send, start, started = threading.Event(), processes._start, []

    def late(*arguments: Any) -> Any:
        assert may_send.wait(10)
        started.append(start(*arguments))
        return started[0]

    monkeypatch.setattr(processes, "_start", late)
    ours, theirs = socket.socketpair()
    task = asyncio.create_task(warm.spawn("", True, theirs))
    await settle()
    for _ in range(2):
        task.cancel()
        await settle()
        assert not task.done()
    may_send.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    theirs.close()
    with pytest.raises(ValueError, match="closed"):  # which it is when it has been waited for
        started[0].is_alive()
    assert ours.recv(1) == b"", "the other end was the process's alone"
    ours.close()


async def test_stopping_leaves_a_server_that_others_use(warm: WarmServer) -> None:
    worker = await warm.spawn()
    await warm.stop()
    await worker.send(Cancel(key=1))
    reports = worker.reports()
    assert [type(await anext(reports)) for _ in range(2)] == [LoadProgress, Step]
    await worker.close()


PROGRAM = """
import asyncio, os, sys, tempfile
print("main imported as", __name__, flush=True)
sys.path.insert(0, {folder!r})
import node_test_workers
from cortex.neuron.processes import WarmServer

async def main():
    server = WarmServer(["colorsys"], node_test_workers.busy, probe=(True,))
    await server.start()
    worker = await server.spawn()
    report = await anext(worker.reports())
    print(report.done, report.total, flush=True)
    {then}

if __name__ == "__main__":
    asyncio.run(main())
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, which pytest's is not everywhere."""
    with tempfile.TemporaryDirectory(prefix="cortex-", dir="/tmp") as name:
        yield Path(name)


async def _run_program(folder: Path, then: str) -> tuple[asyncio.subprocess.Process, list[psutil.Process]]:
    """A program of its own with a busy worker; gives it and all processes that it started."""
    (folder / "program.py").write_text(PROGRAM.format(folder=str(folder), then=then))
    (folder / "node_test_workers.py").write_text(WORKERS)
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, str(folder / "program.py")),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder)},
    )
    assert program.stdout is not None
    assert await program.stdout.readline() == b"main imported as __main__\n"
    pids = [int(pid) for pid in (await program.stdout.readline()).split()]
    started = psutil.Process(program.pid).children(recursive=True)
    assert {process.pid for process in started} >= set(pids), "no second import of the main module"
    return program, started


def files(folder: Path) -> list[Path]:
    """What multiprocessing keeps there."""
    return [file for file in folder.rglob("*") if "pymp-" in str(file.relative_to(folder))]


async def test_a_node_that_is_killed_leaves_no_process_and_no_file(folder: Path) -> None:
    program, started = await _run_program(folder, "await asyncio.sleep(600)")
    assert len(started) >= 3, "warm server, resource tracker, worker"
    assert len(files(folder)) == 2, "a folder and a socket"
    program.kill()
    _, remaining = await asyncio.to_thread(psutil.wait_procs, started, 10)
    assert not remaining
    assert not files(folder)


async def test_a_node_that_fails_without_cleaning_up_ends_all_the_same(folder: Path) -> None:
    program, started = await _run_program(folder, "sys.stdin.readline(); sys.exit(5)")
    assert program.stdin is not None
    program.stdin.write(b"go\n")
    assert await asyncio.wait_for(program.wait(), 10) == 5
    _, remaining = await asyncio.to_thread(psutil.wait_procs, started, 10)
    assert not remaining
    assert not files(folder)


async def test_a_folder_for_temporary_files_with_a_long_name_serves_as_well(folder: Path) -> None:
    """A socket's name has 107 bytes; that of the one in it would have more."""
    long = folder / ("long" * 20)
    long.mkdir()
    program, started = await _run_program(
        long, "print(tempfile.gettempdir(), flush=True); sys.stdin.readline()"
    )
    assert program.stdin is not None
    assert program.stdout is not None
    assert (await program.stdout.readline()).decode().strip() == str(long), "others go on to use it"
    program.stdin.write(b"go\n")
    assert await asyncio.wait_for(program.wait(), 10) == 0
    _, remaining = await asyncio.to_thread(psutil.wait_procs, started, 10)
    assert not remaining
    assert not files(long)
