"""What importing a module really loads, in a process of its own: the static rules cannot see it all."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "src"

MODEL_STACK = {"torch", "transformers", "safetensors", "gguf", "numpy", "tokenizers", "jinja2"}
SERVERS = {"hypercorn", "uvloop", "h11", "aioprometheus"}


def loaded_by(module: str) -> set[str]:
    """What `import module` leaves in `sys.modules`: own modules in full, of all others the first part."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", f"import {module}, sys; print(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=15,
    )
    assert done.returncode == 0, done.stderr
    names = done.stdout.split()
    return {name if name.startswith("cortex.") else name.partition(".")[0] for name in names}


def test_the_package_itself_loads_pluggy_and_nothing_else() -> None:
    ours = {name for name in loaded_by("cortex") if name not in sys.stdlib_module_names}
    before = {name for name in loaded_by("sys") if name not in sys.stdlib_module_names}
    assert ours - before == {"cortex", "pluggy"}


@pytest.mark.parametrize("module", ["cortex.gateway.app", "cortex.hookspecs", "cortex.plugins"])
def test_a_gateway_host_needs_no_part_of_the_model_stack(module: str) -> None:
    assert loaded_by(module).isdisjoint(MODEL_STACK | {"click", "rich"})


def test_the_node_daemon_loads_no_torch() -> None:
    assert loaded_by("cortex.neuron.app").isdisjoint({"torch", "transformers", "gguf", "huggingface_hub"})


def test_the_command_line_loads_neither_side_nor_a_server_before_it_runs() -> None:
    loaded = loaded_by("cortex.cli")
    assert loaded.isdisjoint(MODEL_STACK | SERVERS)
    assert not {name for name in loaded if name.startswith(("cortex.gateway", "cortex.neuron"))}
