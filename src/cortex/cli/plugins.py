"""`cortex plugins`: what is registered in this installation, and who brought it."""

from __future__ import annotations

import click

from cortex.cli.failure import Failure
from cortex.cli.tables import json_option, write_json, write_table
from cortex.config import NeuronConfig
from cortex.plugins import PluginError, Registration, load_gateway_plugins


@click.command()
@json_option
def plugins(as_json: bool) -> None:
    """List dialects, eviction strategies, observers and engines with their distributions."""
    try:
        found = [*load_gateway_plugins().registrations, *_engines()]
    except PluginError as error:
        raise Failure(str(error)) from None
    if as_json:
        write_json(found)
        return
    write_table(("KIND", "NAME", "FROM"), [(item.kind, item.name, item.plugin) for item in found])


def _engines() -> list[Registration]:
    """None where the neuron's packages are not installed: a gateway's host needs no engine."""
    try:
        from cortex.neuron.app import load_engines
    except ModuleNotFoundError:
        return []
    return load_engines(NeuronConfig()).registrations
