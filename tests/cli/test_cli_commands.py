"""The command line as a whole: what there is, and that asking costs little."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cortex.cli import COMMANDS, main

SOURCES = Path(__file__).parents[2] / "src"
HEAVY = {"torch", "numpy", "hypercorn", "uvloop", "aioprometheus", "tokenizers", "jinja2"}


def test_help_lists_every_command(cortex) -> None:
    text = cortex("--help").stdout
    for name, entry in COMMANDS.items():
        assert f"  {name} " in text
        assert entry.summary in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(cortex, name: str) -> None:
    result = cortex(name, "--help")
    assert result.exit_code == 0
    assert f"Usage: main {name}" in result.stdout


def test_an_unknown_command_is_a_misuse(cortex) -> None:
    assert cortex("serv").exit_code == 2


def imported(code: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=15,
        check=True,
    )
    return set(done.stdout.split()[-5000:])


@pytest.mark.slow
def test_help_imports_no_command() -> None:
    modules = imported("from cortex.cli import main\nmain(['--help'], standalone_mode=False)")
    assert {name for name in modules if name.startswith("cortex.")} <= {"cortex.cli"}
    assert "asyncio" not in modules


@pytest.mark.slow
@pytest.mark.parametrize("name", ["status", "models", "load", "unload", "chat", "up"])
def test_commands_that_only_ask_import_neither_side(name: str) -> None:
    modules = imported(f"from cortex.cli import main\nmain.get_command(None, {name!r})")
    assert modules.isdisjoint({*HEAVY, "rich", "cortex.config", "cortex.plugins"})
    assert not {name for name in modules if name.startswith(("cortex.gateway", "cortex.neuron"))}


def test_the_group_is_what_python_m_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cortex", "--version"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=15,
    )
    assert done.stdout.startswith("cortex, version ")
    assert main.name == "main"
