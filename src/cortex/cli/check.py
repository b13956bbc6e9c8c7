"""`cortex check`: reads a configuration file as its daemon would, and says what it found."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import click

from cortex.cli.failure import Misuse
from cortex.config import (
    ConfigError,
    GatewayConfig,
    ModelsConfig,
    NeuronConfig,
    load_gateway,
    load_models,
    load_neuron,
)

KINDS: Final[Mapping[str, type[GatewayConfig | ModelsConfig | NeuronConfig]]] = {
    "cortex": GatewayConfig,
    "models": ModelsConfig,
    "neuron": NeuronConfig,
}


@click.command()
@click.option(
    "-c", "--config", "path", type=click.Path(path_type=Path), required=True, help="The file to check."
)
@click.option(
    "--kind", type=click.Choice(list(KINDS)), help="Which file it is; without it, told by its keys."
)
def check(path: Path, kind: str | None) -> None:
    """Say whether a configuration file is right. Exits with 2 if it is not."""
    try:
        kind = kind or kind_of(path)
        found = FOUND[kind](path)
    except ConfigError as error:
        raise Misuse(str(error)) from None
    click.echo(f"ok: {path}: {found}")


def kind_of(path: Path) -> str:
    """The kind that knows most of the file's top-level keys, else the one its name speaks of.

    Raises ConfigError if neither tells.
    """
    try:
        keys = set(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return "cortex"  # cannot be read at all, which every loader reports alike
    known = {kind: len(keys & set(config.__struct_fields__)) for kind, config in KINDS.items()}
    most = max(known.values())
    best = [kind for kind, count in known.items() if count == most]
    if most and len(best) == 1:
        return best[0]
    named = [kind for kind in KINDS if kind in path.name]
    if len(named) == 1:
        return named[0]
    raise ConfigError(f"{path}: its keys do not tell what it is; say --kind {', '.join(KINDS)}.")


def _gateway(path: Path) -> str:
    config = load_gateway(path)
    models = load_models(config, path)
    keys = "anybody is served" if config.gateway.allow_anonymous else _count(len(config.keys), "key")
    return (
        f"a gateway on {config.gateway.listen}, metrics on {config.gateway.metrics_listen}; "
        f"{_named([node.name for node in config.neurons], 'neuron')}; {keys}; {_catalogue(models)}"
    )


def _models(path: Path) -> str:
    return _catalogue(load_models(GatewayConfig(models_config=str(path)), None))


def _catalogue(models: ModelsConfig) -> str:
    aliases = _named(list(models.aliases), "alias", "aliases")
    return f"{_named([model.id for model in models.models], 'model')}; {aliases}"


def _neuron(path: Path) -> str:
    config = load_neuron(path)
    token = "a node_token" if config.node_token else "no node_token"
    first = _named([model.model_id for model in config.default_models], "default model")
    return f"a neuron on {config.listen}; models in {config.models_dir}; {token}; {first}"


def _count(number: int, noun: str, plural: str | None = None) -> str:
    return f"{number or 'no'} {noun if number == 1 else plural or noun + 's'}"


def _named(names: list[str], noun: str, plural: str | None = None) -> str:
    listed = f" ({', '.join(names)})" if names else ""
    return _count(len(names), noun, plural) + listed


FOUND: Final[Mapping[str, Callable[[Path], str]]] = {
    "cortex": _gateway,
    "models": _models,
    "neuron": _neuron,
}
