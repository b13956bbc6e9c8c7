from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import re, sys, threading
from pathlib import Path
from cortex.neuron import heap

def own():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024

def work():
    pieces = [[str(n) * 8] for n in range(150_000)]
    pieces[:-1:2] = [None] * 75_000
    pieces.append(pieces)

heap.keep_to_one_arena()
before = own()
for _ in range(6):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
heap.trim()
print(own() - before)
"""


@pytest.mark.slow
def test_what_threads_freed_goes_back_to_the_system() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONMALLOC": "malloc"},
    )
    assert int(done.stdout) < 10, "megabytes"
