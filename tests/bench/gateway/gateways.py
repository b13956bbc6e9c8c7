"""The gateways that are compared: how each is installed, configured and started.

A peer lives in a virtual environment of its own under the cache folder, made on first use and kept.
Knows command lines and configuration files; measures nothing.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from . import exchange

ROOT: Final = Path(__file__).resolve().parents[3]
CACHE: Final = ROOT / ".cache" / "bench"
_INSTALL_PATIENCE: Final = 900.0


class NotAvailable(Exception):
    """A gateway cannot be installed or started; the message says why."""


@dataclass(frozen=True)
class Launch:
    """What to start: a command that will listen on `port` of 127.0.0.1."""

    command: list[str]
    port: int
    env: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gateway:
    """One of the compared. `requirement` is what pip installs for it; ours needs none."""

    name: str
    launch: Callable[[Path, int], Launch]
    """Given a working folder and the upstream's port, writes the configuration and says what to start."""
    requirement: str | None = None

    @property
    def title(self) -> str:
        version = (self.requirement or "").partition("==")[2]
        return f"{self.name} {version}".strip()

    @property
    def home(self) -> Path:
        return CACHE / self.name

    def install(self) -> None:
        """Make the virtual environment unless it is there already. Raises NotAvailable."""
        if self.requirement is None:
            return
        mark = self.home / "installed"
        if mark.is_file() and mark.read_text() == self.requirement:
            return
        print(f"installing {self.requirement} into {self.home.relative_to(ROOT)} (once) ...", flush=True)
        shutil.rmtree(self.home, ignore_errors=True)
        pip = [str(self.home / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
        _run([sys.executable, "-m", "venv", str(self.home)])
        _run([*pip, "install", "--quiet", "--only-binary", ":all:", self.requirement])
        mark.write_text(self.requirement)


def clean_environment() -> dict[str, str]:
    """This environment without what would bend the comparison: proxies, import paths, settings of ours."""
    unwanted = ("CORTEX_", "NEURON_", "PYTHON", "LITELLM_", "OPENAI_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(unwanted) and not name.lower().endswith("_proxy")
    }


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nothing listens on at the moment."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def _cortex(folder: Path, upstream: int) -> Launch:
    port, metrics = free_ports(2)
    config = folder / "cortex.toml"
    config.write_text(
        f'[gateway]\nlisten = "127.0.0.1:{port}"\nmetrics_listen = "127.0.0.1:{metrics}"\n\n'
        f'[[neurons]]\nname = "bench"\nendpoint = "http://127.0.0.1:{upstream}"\n'
    )
    command = [sys.executable, "-m", "cortex", "serve", "-c", str(config)]
    return Launch(command, port, {"PYTHONPATH": str(ROOT / "src")})


def _vllm_router(folder: Path, upstream: int) -> Launch:
    port, metrics = free_ports(2)
    command = [str(CACHE / "vllm-router" / "bin" / "vllm-router")]
    command += ["--host", "127.0.0.1", "--port", str(port), "--policy", "round_robin"]
    command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics)]
    return Launch([*command, "--worker-urls", f"http://127.0.0.1:{upstream}"], port)


def _litellm(folder: Path, upstream: int) -> Launch:
    (port,) = free_ports(1)
    config = folder / "litellm.yaml"
    config.write_text(
        f"model_list:\n  - model_name: {exchange.MODEL}\n    litellm_params:\n"
        f"      model: openai/{exchange.MODEL}\n      api_base: http://127.0.0.1:{upstream}/v1\n"
        "      api_key: bench\nlitellm_settings:\n  telemetry: false\n"
        "general_settings:\n  dangerously_permit_weak_or_unset_master_key: true\n"
    )
    command = [str(CACHE / "litellm" / "bin" / "litellm"), "--config", str(config)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return Launch(command, port, {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HOME": str(folder)})


OURS: Final = Gateway("cortex", _cortex)
RUST: Final = Gateway("vllm-router", _vllm_router, "vllm-router==0.1.17")
PYTHON: Final = Gateway("litellm", _litellm, "litellm[proxy]==1.106.2")
ALL: Final = (OURS, RUST, PYTHON)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotAvailable(f"cannot be installed: {error}") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise NotAvailable(f"cannot be installed: {lines[-1] if lines else done.returncode}")
