"""The guards of the suite's conftest: a test that leaves work behind must not pass."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LEAKS = """
import asyncio, subprocess

kept = []

async def test_task():
    kept.append(asyncio.create_task(asyncio.Event().wait()))

async def test_task_that_ends_when_told():
    asyncio.create_task(asyncio.Event().wait()).cancel()

def test_process():
    kept.append(subprocess.Popen(["sleep", "10"]))
"""

CONNECTS = """
import socket

socket.create_connection(("127.0.0.1", 9))

def test_nothing():
    pass
"""


def run(folder: Path, source: str) -> str:
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (folder / "test_it.py").write_text(source)
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode != 0, done.stdout
    return done.stdout


@pytest.mark.slow
def test_tasks_and_processes_that_are_left_behind_are_errors(tmp_path: Path) -> None:
    output = run(tmp_path, LEAKS)
    assert "3 passed, 2 errors" in output
    assert "ERROR at teardown of test_task _" in output
    assert "tasks are left running" in output
    assert "processes are left running" in output
    assert "sleep 10" in output


@pytest.mark.slow
def test_a_connection_during_collection_is_an_error(tmp_path: Path) -> None:
    assert "a connection is opened while tests are collected" in run(tmp_path, CONNECTS)
