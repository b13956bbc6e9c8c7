"""The command `cortex` (and `neuron`): its list of sub-commands, each imported only when it is used.

Knows names and one line about each, so that `--help` costs nothing; what they do is in the modules
beside this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import click

from cortex import __version__


def _up() -> click.Command:
    from cortex.cli.up import up

    return up


def _serve() -> click.Command:
    from cortex.cli.serving import serve_command

    return serve_command


def _neuron() -> click.Command:
    from cortex.cli.serving import neuron_command

    return neuron_command


def _status() -> click.Command:
    from cortex.cli.fleet import status

    return status


def _models() -> click.Command:
    from cortex.cli.fleet import models

    return models


def _load() -> click.Command:
    from cortex.cli.residency import load

    return load


def _unload() -> click.Command:
    from cortex.cli.residency import unload

    return unload


def _chat() -> click.Command:
    from cortex.cli.chat import chat

    return chat


def _check() -> click.Command:
    from cortex.cli.check import check

    return check


def _plugins() -> click.Command:
    from cortex.cli.plugins import plugins

    return plugins


class Entry(NamedTuple):
    command: Callable[[], click.Command]
    summary: str


COMMANDS: Final = {
    "up": Entry(_up, "Start a gateway, a neuron and a model on this machine."),
    "serve": Entry(_serve, "Run the gateway."),
    "neuron": Entry(_neuron, "Run the node daemon."),
    "status": Entry(_status, "Show nodes, devices, memory and what they run."),
    "models": Entry(_models, "List the models that can be asked for."),
    "load": Entry(_load, "Load a model on a node."),
    "unload": Entry(_unload, "Take a model off its nodes."),
    "chat": Entry(_chat, "Talk to a model."),
    "check": Entry(_check, "Say whether a configuration file is right."),
    "plugins": Entry(_plugins, "List dialects, eviction strategies, observers and engines."),
}


class LazyGroup(click.Group):
    """A group that lists its commands without importing them."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = COMMANDS.get(cmd_name)
        return entry.command() if entry else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.summary) for name, entry in COMMANDS.items()])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="cortex")
def main() -> None:
    """One endpoint over a handful of mismatched GPU boxes."""


def neuron_main() -> None:
    """The command `neuron`: `cortex neuron` under its own name."""
    _neuron()(prog_name="neuron")
