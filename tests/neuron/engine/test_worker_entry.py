"""How a worker process begins and how it cannot outlive its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PARENT = """
import os, socket, sys, time
from cortex.neuron.engine import entry
ours, theirs = socket.socketpair()
if os.fork() == 0:
    ours.close()
    entry.main(theirs, sys.argv[1], 1)
print(theirs.close() or ours.recv(1000).decode(), flush=True)
time.sleep(60)
"""

WORKER = """
import os, signal, sys
def run(sock, links):
    ignored = [signal.getsignal(number) == signal.SIG_IGN for number in (signal.SIGINT, signal.SIGTERM)]
    sock.sendall(repr((os.getpid(), os.environ["CUDA_VISIBLE_DEVICES"], ignored)).encode())
    sock.recv(1)
    {after}
"""


def start(directory: Path, device: str, after: str = "pass") -> subprocess.Popen[str]:
    """A parent whose forked worker is a stand-in without torch."""
    (directory / "torch.py").write_text("def set_num_threads(count): pass")
    (directory / "stand_in.py").write_text(WORKER.format(after=after))
    script = PARENT.replace("ours, theirs", 'entry.WORKER = "stand_in"\nours, theirs', 1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(directory), *sys.path])}
    return subprocess.Popen(
        [sys.executable, "-c", script, device],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(parent: subprocess.Popen[str]) -> tuple[int, str, list[bool]]:
    assert parent.stdout is not None
    pid, devices, ignored = eval(parent.stdout.readline())
    return pid, devices, ignored


@pytest.mark.parametrize(("device", "visible"), [("cpu", ""), ("GPU-1a2b", "GPU-1a2b")])
def test_only_the_ordered_device_is_visible_and_terminal_signals_are_ignored(
    tmp_path: Path, device: str, visible: str
) -> None:
    with start(tmp_path, device) as parent:
        _, devices, ignored = said(parent)
        parent.kill()
        parent.communicate()
    assert devices == visible
    assert ignored == [True, True]


def test_a_worker_dies_with_its_parent_even_if_that_is_killed(tmp_path: Path) -> None:
    """The worker looks at nothing any more, like a step that hangs. It shares the parent's standard
    output, which reaches its end only when both are gone.
    """
    with start(tmp_path, "cpu", after="import time; time.sleep(60)") as parent:
        said(parent)
        parent.send_signal(signal.SIGKILL)
        parent.communicate(timeout=10)
    assert parent.returncode == -signal.SIGKILL


@pytest.mark.parametrize(("after", "code"), [("pass", 0), ("raise RuntimeError('broken')", 1)])
def test_the_exit_code_tells_an_error_and_the_log_which(tmp_path: Path, after: str, code: int) -> None:
    (tmp_path / "torch.py").write_text("def set_num_threads(count): pass")
    (tmp_path / "stand_in.py").write_text(f"def run(sock, links):\n    {after}")
    script = "from cortex.neuron.engine import entry\nentry.WORKER = 'stand_in'\nentry.main(None, 'cpu', 1)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == code
    assert ("broken" in ended.stderr) == bool(code)


@pytest.mark.slow
def test_importing_the_worker_brings_all_that_a_load_needs_and_starts_nothing() -> None:
    """No thread and no CUDA: what is forked from a process with either does not work."""
    script = """
import os, sys
import cortex.neuron.engine.worker
assert {"torch", "cortex.neuron.models.llama", "cortex.neuron.weights.dequant"} <= set(sys.modules)
assert not sys.modules["torch"].cuda.is_initialized()
assert len(os.listdir("/proc/self/task")) == 1, "a thread was started"
"""
    environment = {name: value for name, value in os.environ.items() if "NUM_THREADS" not in name}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", script], env=environment, check=True)
