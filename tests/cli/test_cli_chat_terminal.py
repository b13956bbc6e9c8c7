"""`cortex chat` on a real terminal: a pseudo-terminal, a server on loopback, and real signals."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import pty
import signal
import sys
import termios
from collections.abc import AsyncIterator

import pytest

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
REFUSAL = b'HTTP/1.1 400 No\r\nconnection: close\r\n\r\n{"error": {"message": "Too long."}}'


def event(text: str, finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


class Model:
    """Answers whole questions at once; one that asks for a story is never finished."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []
        self.left = asyncio.Event()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(
            int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
        )
        messages = json.loads(await reader.readexactly(length))["messages"]
        self.asked.append([message["content"] for message in messages])
        if "fail" in messages[-1]["content"]:
            writer.write(REFUSAL)
            writer.close()
            return
        writer.write(HEAD)
        if "story" in messages[-1]["content"]:
            writer.write(event("Once \x1b]0;owned\x07upon"))
            await reader.read()
            self.left.set()
        else:
            writer.write(event("Hello", "stop") + b"data: [DONE]\n\n")
        writer.close()


class Terminal:
    """A program on a pseudo-terminal of its own, so that Ctrl-C and Ctrl-D are what they are."""

    def __init__(self, master: int, process: asyncio.subprocess.Process) -> None:
        self._master = master
        self.process = process
        self._seen = ""
        self._more = asyncio.Event()
        asyncio.get_running_loop().add_reader(master, self._read)

    def _read(self) -> None:
        try:
            data = os.read(self._master, 4096)
        except OSError:  # the other side is closed
            data = b""
        if not data:
            self.close()
        self._seen += data.decode()
        self._more.set()

    async def shows(self, text: str) -> str:
        """Waits for `text` and gives all that came up to its end."""
        async with asyncio.timeout(15):
            while text not in self._seen:
                self._more.clear()
                await self._more.wait()
        before, _, self._seen = self._seen.partition(text)
        return before + text

    async def interrupt_until(self, text: str) -> None:
        """Ctrl-C, as often as it takes: Python loses one that comes just before readline waits for keys."""
        for _ in range(30):
            self.type("\x03")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await self.shows(text)
                    return
        pytest.fail(f"{text!r} was not shown, but {self._seen!r}")

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._master)


@pytest.fixture
async def model() -> AsyncIterator[tuple[Model, str]]:
    served = Model()
    server = await asyncio.start_server(served.serve, "127.0.0.1", 0)
    yield served, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    await server.wait_closed()


@pytest.fixture
async def terminal(model) -> AsyncIterator[Terminal]:
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "cortex", "chat", "m", "--endpoint", model[1]),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        env={**os.environ, "TERM": "dumb", "INPUTRC": "/dev/null"},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(slave)
    shown = Terminal(master, process)
    yield shown
    if process.returncode is None:
        process.kill()
        await process.wait()
    shown.close()
    os.close(master)


@pytest.mark.slow
async def test_ctrl_c_stops_the_answer_and_not_the_program(model, terminal) -> None:
    asked = model[0].asked
    await terminal.shows(">>> ")
    terminal.type("a story\n")
    told = await terminal.shows("upon")
    assert "\x1b]0;" not in told  # a model cannot rename the window
    terminal.type("\x03")
    await terminal.shows("(stopped)")
    await model[0].left.wait()  # the server is not left generating
    await terminal.shows(">>> ")
    terminal.type("hi\n")
    await terminal.shows("Hello\r\n")
    assert asked[1] == ["a story", "Once \x1b]0;owned\x07upon", "hi"]
    await terminal.shows(">>> ")
    terminal.type("half a line")
    await terminal.shows("half a line")
    await terminal.interrupt_until(">>> ")  # at the prompt Ctrl-C empties the line
    terminal.type("\x04")
    assert await terminal.process.wait() == 0
    assert len(asked) == 2


@pytest.mark.slow
async def test_quit_leaves_and_an_error_does_not(model, terminal) -> None:
    await terminal.shows(">>> ")
    terminal.type("fail\n")
    await terminal.shows("error: Too long.\r\n")
    await terminal.shows(">>> ")
    terminal.type("hi\n")
    await terminal.shows("Hello\r\n>>> ")
    terminal.type("/quit\n")
    assert await terminal.process.wait() == 0
    assert model[0].asked[1] == ["hi"]  # the turn that failed is no part of the conversation


@pytest.mark.slow
async def test_a_termination_ends_it(model, terminal) -> None:
    await terminal.shows(">>> ")
    terminal.process.send_signal(signal.SIGTERM)
    assert await terminal.process.wait() == -signal.SIGTERM
