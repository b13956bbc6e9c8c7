"""`cortex up` before its children start: what it decides, writes and tells."""

import asyncio
import json
import os
import shlex
import socket
import sys
from pathlib import Path

import pytest

from cortex.cli.children import Child, start_child
from cortex.cli.failure import Failure
from cortex.cli.up import (
    DEFAULT_MODEL,
    Plan,
    cache_dir,
    guide,
    program,
    reference,
    stop_all,
    while_alive,
    write_configs,
)
from cortex.config import load_gateway, load_neuron
from cortex.wire.node import LoadRequest


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return Plan(
        model_id="it's",
        source="pypi:x==1",
        models_dir=tmp_path / 'mo"dels',
        port=4001,
        metrics_port=4002,
        neuron_port=4003,
        run_dir=tmp_path,
        verbose=False,
    )


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return sock.getsockname()[1]


def test_the_written_configurations_are_what_the_daemons_read(plan: Plan) -> None:
    write_configs(plan)
    gateway = load_gateway(plan.run_dir / "cortex.toml", {})
    neuron = load_neuron(plan.run_dir / "neuron.toml", {})
    assert gateway.gateway.listen == "127.0.0.1:4001"
    assert gateway.gateway.metrics_listen == "127.0.0.1:4002"
    assert [node.endpoint for node in gateway.neurons] == ["http://127.0.0.1:4003"]
    assert neuron.listen == "127.0.0.1:4003"
    assert neuron.models_dir == str(plan.models_dir)
    assert {"path", "hf", "pypi"} <= set(neuron.sources)


def test_references_become_a_source_and_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tiny.gguf").touch()
    (tmp_path / "qwen").mkdir()
    monkeypatch.chdir(tmp_path)
    assert reference(DEFAULT_MODEL) == (DEFAULT_MODEL, "smollm2-135m")
    assert reference("hf:org/x") == ("hf:org/x", "org/x")
    assert reference("pypi:llm-x==0.1") == ("pypi:llm-x==0.1", "llm-x")
    assert reference("tiny.gguf") == (str(tmp_path / "tiny.gguf"), "tiny")
    assert reference(str(tmp_path / "qwen")) == (str(tmp_path / "qwen"), "qwen")


def test_the_curl_line_survives_a_shell(plan: Plan) -> None:
    [line] = [line for line in guide(plan, "cortex").splitlines() if "curl" in line]
    words = shlex.split(line)
    assert words[:2] == ["curl", "http://127.0.0.1:4001/v1/chat/completions"]
    assert json.loads(words[words.index("-d") + 1])["model"] == "it's"


def test_the_guide_tells_how_to_go_on(plan: Plan) -> None:
    text = guide(plan, "cortex")
    assert "OPENAI_BASE_URL=http://127.0.0.1:4001/v1" in text
    assert "http://127.0.0.1:4002/metrics" in text
    assert "cortex chat --temperature 0 --endpoint http://127.0.0.1:4001\n" in text
    assert "cortex chat --temperature 0\n" in guide(plan._replace(port=31313), "cortex")


def test_the_program_is_named_so_that_it_can_be_called() -> None:
    assert program(lambda name: "/usr/bin/cortex") == "cortex"
    assert program(lambda name: None).partition(" ")[0].startswith("/")


def test_the_cache_directory_follows_the_desktops_convention(tmp_path: Path) -> None:
    assert cache_dir({"XDG_CACHE_HOME": str(tmp_path)}) == tmp_path / "cortex"
    assert cache_dir({}) == Path.home() / ".cache" / "cortex"


@pytest.fixture
def up(cortex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs `cortex up` on free ports with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*args: str, **ports: int):
        chosen = {"port": free_port(), "metrics-port": free_port(), "neuron-port": free_port(), **ports}
        return cortex("up", *(f"--{name}={port}" for name, port in chosen.items()), *args)

    return run


@pytest.mark.parametrize(("args", "quant"), [((), None), (("--quant", "q4_k_m"), "q4_k_m")])
def test_the_load_asks_for_the_quant_that_was_given(
    up, monkeypatch: pytest.MonkeyPatch, args: tuple[str, ...], quant: str | None
) -> None:
    plans: list[Plan] = []

    async def live(plan: Plan) -> None:
        plans.append(plan)

    monkeypatch.setattr("cortex.cli.up._live", live)
    assert up("--model", "hf:org/name", *args).exit_code == 0
    assert plans[0].request == LoadRequest(model_id="org/name", source="hf:org/name", quant=quant)


@pytest.mark.parametrize("option", ["port", "metrics-port", "neuron-port"])
def test_a_port_in_use_is_one_line_that_names_the_option(up, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = up(**{option: port})
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"error: cannot listen on 127.0.0.1:{port}: Address already in use")
    assert f"--{option}." in result.stderr
    assert result.stderr.count("\n") == 1


def test_two_listeners_on_one_port_are_refused(up) -> None:
    port = free_port()
    assert "needs a port of its own" in up(**{"port": port, "neuron-port": port}).stderr


def test_a_models_directory_that_cannot_be_written_is_one_line(up, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = up("--models-dir", str(tmp_path / "file" / "models"))
    assert result.exit_code == 1
    assert result.stderr == (
        f"error: cannot write to {tmp_path}/file/models: Not a directory; choose another with --models-dir.\n"
    )


def test_a_cache_that_cannot_be_written_is_one_line(up, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    result = up("--models-dir", str(tmp_path / "models"))
    assert result.exit_code == 1
    assert "set XDG_CACHE_HOME" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_model_that_is_not_there_is_one_line(up) -> None:
    result = up("--model", "nonesuch.gguf")
    assert (result.exit_code, result.stdout) == (1, "")
    assert (
        result.stderr
        == "error: --model nonesuch.gguf: there is no such file, and it does not begin with hf: or pypi:.\n"
    )


async def python(code: str, log: Path) -> Child:
    return await start_child("neuron", [sys.executable, "-S", "-c", code], os.environ, log)


async def test_a_child_that_dies_ends_the_wait_with_its_last_words(tmp_path: Path) -> None:
    child = await python("print('no memory'); raise SystemExit(3)", tmp_path / "log")
    with pytest.raises(Failure, match="the neuron ended with status 3") as caught:
        await while_alive(asyncio.Event().wait(), [child], asyncio.Event())
    assert caught.value.more == ["no memory"]
    await child.stop(0)


async def test_the_death_of_a_child_explains_a_lost_connection(tmp_path: Path) -> None:
    async def work() -> None:
        await child.ended()  # as a client sees it: the connection is gone, the reason is not known yet
        raise Failure("the connection was lost.")

    child = await python("raise SystemExit(3)", tmp_path / "log")
    with pytest.raises(Failure, match="status 3"):
        await while_alive(work(), [child], asyncio.Event())
    await child.stop(0)


async def test_work_that_fails_while_all_live_fails_with_its_own_words(tmp_path: Path, monkeypatch) -> None:
    async def work() -> None:
        raise Failure("No such model.")

    monkeypatch.setattr("cortex.cli.up.DEATH_WITHIN_S", 0.0)
    child = await python("import time; time.sleep(60)", tmp_path / "log")
    with pytest.raises(Failure, match=r"No such model\."):
        await while_alive(work(), [child], asyncio.Event())
    await child.stop(0)


async def test_a_stop_ends_the_wait_and_the_work(tmp_path: Path) -> None:
    stop, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        stop.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    child = await python("import time; time.sleep(60)", tmp_path / "log")
    assert not await while_alive(work(), [child], stop)
    assert cancelled.is_set()
    await child.stop(0)


DRAINS = """
import os, signal, socket, sys, time
def finish(*_):
    os.kill({neuron}, 0)
    print("the neuron was there to the end", flush=True)
    os._exit(0)
signal.signal(signal.SIGTERM, finish)
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.sendto(b"READY=1", "\\0" + os.environ["NOTIFY_SOCKET"][1:])
time.sleep(60)
"""


async def test_the_neuron_outlives_the_gateway_that_finishes_its_answers(tmp_path: Path) -> None:
    neuron = await python("import time; time.sleep(60)", tmp_path / "neuron")
    gateway = await python(DRAINS.format(neuron=neuron.pid), tmp_path / "gateway")
    await gateway.ready()
    await stop_all([neuron, gateway])
    assert await gateway.ended() == 0
    assert "to the end" in (tmp_path / "gateway").read_text()
    assert await neuron.ended() < 0
