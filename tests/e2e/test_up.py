"""`cortex up` as people run it, with a real model: ready, an answer, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.real_model, pytest.mark.timeout(120)]

CLI = [sys.executable, "-m", "cortex"]
SOURCES = Path(__file__).parents[2] / "src"


class Up:
    """A running `cortex up`, its three ports, and what it has printed up to its ready line."""

    def __init__(self, model: Path, cache: Path) -> None:
        self.ports = free_ports(3)
        self.endpoint = f"http://127.0.0.1:{self.ports[0]}"
        options = ["--port", "--metrics-port", "--neuron-port"]
        ports = [f"{option}={port}" for option, port in zip(options, self.ports, strict=True)]
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(cache), "PYTHONPATH": str(SOURCES)}
        self.process = subprocess.Popen(
            [*CLI, "up", "--model", str(model), *ports],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.printed: list[str] = []
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed.append(line)
            if line.startswith("ready"):
                break
        else:
            pytest.fail(f"up ended before it was ready: {''.join(self.printed)}")
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def all_gone(self) -> bool:
        _, alive = psutil.wait_procs(self.family, timeout=10)
        return not alive

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()
        psutil.wait_procs(self.family, timeout=10)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@pytest.fixture
def up(smollm2_path: Path, tmp_path: Path) -> Iterator[Callable[[], Up]]:
    started: list[Up] = []

    def start() -> Up:
        started.append(Up(smollm2_path, tmp_path))
        return started[0]

    yield start
    for running in started:
        running.close()


def fetch(url: str, body: dict[str, object] | None = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return bytes(reply.read())


def test_it_gets_ready_answers_and_ends_on_sigterm_without_a_trace(up, smollm2_path: Path) -> None:
    running = up()
    assert re.match(r"ready in \d+\.\d s: ", running.printed[-1])
    model = smollm2_path.stem
    cards = json.loads(fetch(f"{running.endpoint}/v1/models"))["data"]
    assert [(card["id"], card["loaded"]) for card in cards] == [(model, True)]
    question = {"role": "user", "content": "What is the capital of France?"}
    body = {"model": model, "messages": [question], "max_tokens": 12, "temperature": 0}
    reply = json.loads(fetch(f"{running.endpoint}/v1/chat/completions", body))
    assert "Paris" in reply["choices"][0]["message"]["content"]
    assert b"cortex_requests_total" in fetch(f"http://127.0.0.1:{running.ports[1]}/metrics")
    said = subprocess.run(
        [*CLI, "chat", "-m", "What is the capital of France?", "--temperature", "0", "--max-tokens", "12"],
        env={**running.environment, "CORTEX_ENDPOINT": running.endpoint},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (said.returncode, said.stderr) == (0, "")
    assert "Paris" in said.stdout
    assert len(running.family) >= 3  # the gateway, the neuron and a worker at least
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(40) == 0
    assert running.all_gone()


def test_killing_it_leaves_no_process_behind(up) -> None:
    running = up()
    running.process.kill()
    assert running.all_gone()
