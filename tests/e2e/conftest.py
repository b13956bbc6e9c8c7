"""Real daemons in real processes on loopback: two neurons behind a gateway, as an operator runs them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

SOURCES = Path(__file__).parents[2] / "src"
PATIENCE_S = 60.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def ask(url: str, body: dict[str, Any] | None = None) -> tuple[int, Any]:
    """Status and JSON of a reply, errors included."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """What `condition` gives once it is true. Daemons in other processes can only be asked again."""
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if found := condition():
                return found
        except (urllib.error.URLError, OSError):
            pass
        time.sleep(0.05)
    pytest.fail(f"waited {PATIENCE_S:g} s in vain for {what}")


class Daemon:
    """A `cortex` subcommand with its configuration file."""

    def __init__(self, command: str, config: Path, port: int) -> None:
        self.endpoint = f"http://127.0.0.1:{port}"
        self._arguments = [sys.executable, "-m", "cortex", command, "-c", str(config)]
        self._log = config.with_suffix(".log")
        self.start()

    def start(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(SOURCES)}
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._arguments, env=environment, stdout=log, stderr=log)

    def family(self) -> list[psutil.Process]:
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]

    def kill(self) -> None:
        """SIGKILL, and nothing of it may stay."""
        family = self.family()
        self.process.kill()
        self.process.wait()
        _, left = psutil.wait_procs(family, timeout=10)
        assert not left, left

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(PATIENCE_S)

    def log(self) -> str:
        return self._log.read_text()


class Site:
    """A gateway over neurons; each neuron has one model of its own."""

    def __init__(self, folder: Path, models: dict[str, Path]) -> None:
        self.neurons: dict[str, Daemon] = {}
        entries = []
        for name, model in models.items():
            port = free_port()
            config = folder / f"{name}.toml"
            config.write_text(
                f'listen = "127.0.0.1:{port}"\nmodels_dir = "{model.parent}"\n'
                f'[[default_models]]\nmodel_id = "model-of-{name}"\nsource = "{model.name}"\n'
            )
            self.neurons[name] = Daemon("neuron", config, port)
            entries.append(f'[[neurons]]\nname = "{name}"\nendpoint = "http://127.0.0.1:{port}"\n')
        port, metrics_port = free_port(), free_port()
        config = folder / "cortex.toml"
        config.write_text(
            f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics_port}"\n'
            f"poll_interval_s = 0.2\n" + "".join(entries)
        )
        self.gateway = Daemon("serve", config, port)
        self.metrics = f"http://127.0.0.1:{metrics_port}/metrics"

    def loaded(self) -> dict[str, bool]:
        _, listing = ask(f"{self.gateway.endpoint}/v1/models")
        return {card["id"]: card["loaded"] for card in listing["data"]}

    def wait_for(self, condition: Callable[[], Any], what: str) -> None:
        wait_for(condition, what)

    def close(self) -> None:
        for daemon in (self.gateway, *self.neurons.values()):
            daemon.stop()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, smollm2_path: Path) -> Iterator[Site]:
    """Two neurons, `a` and `b`, whose models have different names, behind one gateway."""
    folder = tmp_path_factory.mktemp("site")
    running = Site(folder, {"a": smollm2_path, "b": smollm2_path})
    try:
        wanted = {"model-of-a": True, "model-of-b": True}
        wait_for(lambda: running.loaded() == wanted, "both models to be loaded")
        yield running
    finally:
        running.close()
