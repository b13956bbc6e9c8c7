"""`cortex status` and `cortex models`: what a gateway or a neuron has to show, as tables or JSON."""

from __future__ import annotations

from typing import Any

import click
import msgspec

from cortex.cli.client import Address, address_options, run
from cortex.cli.tables import json_option, memory, write_json, write_table
from cortex.cli.view import list_models, list_nodes
from cortex.wire.node import ModelCard, ModelReport, NodeView


@click.command()
@address_options
@json_option
def status(endpoint: str, key: str | None, as_json: bool) -> None:
    """Show nodes, devices, memory and what they run."""
    nodes = run(Address(endpoint, key), list_nodes)
    if as_json:
        write_json(nodes)
        return
    if not nodes:
        click.echo("no nodes are configured; add [[neurons]] to cortex.toml.")
        return
    write_table(
        ("NODE", "STATE", "VERSION", "DEVICE", "MEMORY USED>", "TOTAL>", "BUSY>", "TEMP>"),
        [row for node in nodes for row in _device_rows(node)],
    )
    running = [(node, model) for node in nodes for model in node.models]
    if running:
        click.echo()
        write_table(
            ("MODEL", "NODE", "STATUS", "DEVICES", "MEMORY>", "IN FLIGHT>", "CONTEXT>"),
            [_model_row(node, model) for node, model in running],
        )


def _device_rows(node: NodeView) -> list[tuple[Any, ...]]:
    state = "up" if node.up else f"down: {node.detail or 'no reason given'}"
    health = {device.index: device for device in node.device_health}
    rows: list[tuple[Any, ...]] = []
    for device in node.devices:
        now = health.get(device.index)
        rows.append(
            (
                node.name,
                state,
                node.version,
                device.name,
                memory(now.vram_used_mb) if now else None,
                memory(device.vram_total_mb),
                None if now is None or now.utilization_pct is None else f"{now.utilization_pct:.0f} %",
                None if now is None or now.temp_c is None else f"{now.temp_c:.0f} °C",
            )
        )
    return rows or [(node.name, state, node.version, None, None, None, None, None)]


def _model_row(node: NodeView, model: ModelReport) -> tuple[Any, ...]:
    state: str = model.status
    if model.progress and model.progress.total:
        state = f"{state} ({100 * model.progress.done // model.progress.total} %)"
    elif not model.servable.ok and model.status == "failed":
        state = f"failed: {model.servable.detail or model.servable.reason}"
    context = model.limit.context if model.limit else None
    used = memory(model.vram_used_mb) if model.vram_used_mb else None
    return model.id, node.name, state, ", ".join(model.devices), used, model.in_flight, context or None


@click.command()
@address_options
@json_option
def models(endpoint: str, key: str | None, as_json: bool) -> None:
    """List the models that can be asked for."""
    cards = run(Address(endpoint, key), list_models)
    if as_json:
        # every field, also those that the wire leaves out at their default
        write_json([msgspec.structs.asdict(card) for card in cards])
        return
    if not cards:
        click.echo("no models; `cortex load MODEL` loads one.")
        return
    write_table(("ID", "LOADED", "WHERE", "CONTEXT>"), [_card_row(card) for card in cards])


def _card_row(card: ModelCard) -> tuple[Any, ...]:
    name = f"{card.id} (alias of {card.alias_of})" if card.alias_of else card.id
    where = ", ".join(
        _place(place.get("node", "?"), place.get("status", "loaded")) for place in card.locations
    )
    context = card.limit.context if card.limit else 0
    return name, "yes" if card.loaded else "no", where, context or None


def _place(node: str, status: str) -> str:
    return node if status == "loaded" else f"{node} ({status})"
