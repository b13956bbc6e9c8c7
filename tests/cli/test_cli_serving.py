"""`cortex serve` and `neuron` as processes: start, refusals to start, drain and end."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cortex.cli.children import Child, start_child
from cortex.cli.serving import finished_before

GATEWAY = '[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:0"\n'
REQUEST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def config(folder: Path, text: str) -> Path:
    file = folder / "cortex.toml"
    file.write_text(text)
    return file


def ended(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Runs `cortex ARGS`, which is expected to end by itself."""
    return subprocess.run(
        [sys.executable, "-m", "cortex", *map(str, args)], capture_output=True, text=True, timeout=15
    )


@pytest.mark.slow
@pytest.mark.parametrize("command", ["serve", "neuron"])
def test_a_wrong_configuration_is_one_line_and_status_2(tmp_path: Path, command: str) -> None:
    done = ended(command, "-c", config(tmp_path, "listn = 1\n"))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/cortex.toml: listn: unknown key")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "text"), [("serve", GATEWAY), ("neuron", 'listen = "127.0.0.1:{port}"\n')]
)
def test_a_port_in_use_is_one_line_and_status_1(tmp_path: Path, command: str, text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = ended(command, "-c", config(tmp_path, text.format(port=port)))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert done.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: ")


@pytest.fixture
async def gateway(tmp_path: Path) -> AsyncIterator[Callable]:
    """Starts a gateway with the configuration; gives the child and its API port."""
    started: list[Child] = []

    async def start(text: str = GATEWAY) -> tuple[Child, int]:
        log = tmp_path / "log"
        command = [sys.executable, "-m", "cortex", "serve", "-c", str(config(tmp_path, text.format(port=0)))]
        child = await start_child("gateway", command, os.environ, log)
        started.append(child)
        await child.ready()
        line = next(line for line in log.read_text().splitlines() if " listening " in line)
        return child, int(line.partition("addresses=127.0.0.1:")[2].partition(",")[0])

    yield start
    await asyncio.gather(*(child.stop(0) for child in started))


async def ask(port: int, request: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    return reader, writer


@pytest.mark.slow
async def test_it_serves_when_it_says_so_and_ends_cleanly(gateway, tmp_path: Path) -> None:
    child, port = await gateway()
    reader, writer = await ask(port, REQUEST)
    assert b" 200 " in await reader.readline()
    assert b'"status":"degraded"' in await reader.read()
    writer.close()
    os.kill(child.pid, signal.SIGTERM)
    assert await child.ended() == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert all(line.startswith("time=") for line in lines)
    assert "signal=SIGTERM" in lines[-2]
    assert lines[-1].endswith("ended service=gateway")


@pytest.mark.slow
async def test_running_requests_end_first_and_a_second_signal_ends_at_once(gateway) -> None:
    async def node(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readline()).split()[1]
        if path == b"/models":
            body = b'[{"id": "m", "status": "loaded"}]'
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        elif path == b"/v1/chat/completions":
            asked.set()
        await reader.read()
        writer.close()

    asked = asyncio.Event()
    server = await asyncio.start_server(node, "127.0.0.1", 0)
    address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    child, port = await gateway(GATEWAY + f'[[neurons]]\nname = "a"\nendpoint = "http://{address}"\n')
    body = b'{"model": "m", "messages": [{"role": "user", "content": "hi"}]}'
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body)
    _, writer = await ask(port, head + body)
    await asked.wait()
    os.kill(child.pid, signal.SIGINT)
    end = asyncio.ensure_future(child.ended())
    done, _ = await asyncio.wait({end}, timeout=0.3)
    assert not done  # the request is still running
    os.kill(child.pid, signal.SIGINT)
    assert await end == -signal.SIGINT
    writer.close()
    server.close()


async def test_work_that_ends_before_the_stop_is_done() -> None:
    async def work() -> None:
        pass

    assert await finished_before(asyncio.Event(), work())


async def test_a_stop_cancels_the_work() -> None:
    stop, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        stop.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    assert not await finished_before(stop, work())
    assert cancelled.is_set()


async def test_work_that_fails_fails() -> None:
    async def work() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await finished_before(asyncio.Event(), work())
