"""Configuration files: TOML plus environment into frozen Structs that refuse unknown keys.

Read by the composition roots and the command line only. Checks shapes and names, not whether a host
answers or a path holds a model.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args, get_type_hints

import msgspec

from cortex.wire.node import Limit


class ConfigError(Exception):
    """One line that names the file, the key, what was expected and what to write."""


_Name = Annotated[str, msgspec.Meta(min_length=1)]
_AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]
_Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]
"""A time that can pass: neither nothing nor for ever."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class GatewaySection(_Section, frozen=True, kw_only=True):
    listen: str = "127.0.0.1:31313"
    metrics_listen: str = "127.0.0.1:31314"
    allow_anonymous: bool = False
    body_limit_mb: _AtLeastOne = 64
    poll_interval_s: _Seconds = 5.0
    idle_timeout_s: _Seconds = 300.0


class EvictionSection(_Section, frozen=True, kw_only=True):
    strategy: str = "lru"
    defrag_after_cycles: int = 0


class NeuronSection(_Section, frozen=True, kw_only=True):
    name: str
    endpoint: str
    node_token: str | None = None


class KeySection(_Section, frozen=True, kw_only=True):
    name: str
    key: str


class GatewayConfig(_Section, frozen=True, kw_only=True):
    """`cortex.toml`."""

    gateway: GatewaySection = GatewaySection()
    eviction: EvictionSection = EvictionSection()
    neurons: tuple[NeuronSection, ...] = ()
    keys: tuple[KeySection, ...] = ()
    models_config: str | None = None


class LimitSection(_Section, frozen=True, kw_only=True):
    context: int = 0
    input: int = 0
    output: int = 0

    def to_wire(self) -> Limit:
        return Limit(context=self.context, input=self.input, output=self.output)


class ModelSection(_Section, frozen=True, kw_only=True):
    id: str
    harness: str = "torch"
    quant: str | None = None
    vram_mb: int | None = None
    min_devices: int = 1
    min_device_vram_mb: int | None = None
    pinned_on: tuple[str, ...] = ()
    pin: bool = False
    priority: int = 100
    source: str | None = None
    limit: LimitSection | None = None
    cost: dict[str, float] | None = None
    capabilities: tuple[str, ...] = ()
    keep_alive: float | None = None
    max_replicas: int | None = None


class ModelsConfig(_Section, frozen=True, kw_only=True):
    """`models.toml`: the catalogue."""

    models: tuple[ModelSection, ...] = ()
    aliases: dict[str, str] = {}


class DefaultModel(_Section, frozen=True, kw_only=True):
    model_id: _Name
    source: _Name | None = None
    harness: _Name | None = None
    quant: _Name | None = None
    dtype: _Name | None = None
    devices: tuple[str, ...] | None = None
    tensor_parallel: _AtLeastOne | None = None
    memory_mb: _AtLeastOne | None = None


class TorchSection(_Section, frozen=True, kw_only=True):
    dtype: str | None = None
    threads: _AtLeastOne | None = None
    cuda_paged: bool = False
    cuda_graphs: bool = False
    cuda_run_ahead: bool = False
    watchdog_s: _Seconds = 60.0
    prompt_lookup: bool = True


class HarnessSection(_Section, frozen=True, kw_only=True):
    torch: TorchSection = TorchSection()


class AdmissionSection(_Section, frozen=True, kw_only=True):
    max_running: _AtLeastOne = 8
    max_waiting: Annotated[int, msgspec.Meta(ge=0)] = 32
    max_wait_s: Annotated[float, msgspec.Meta(ge=0, le=86_400)] = 120.0
    max_per_caller: Annotated[int, msgspec.Meta(ge=0)] = 0


class PrefixCacheSection(_Section, frozen=True, kw_only=True):
    enabled: bool = True
    state_mb: Annotated[int, msgspec.Meta(ge=0)] = 1024


class NeuronConfig(_Section, frozen=True, kw_only=True):
    """`neuron.toml`."""

    listen: str = "127.0.0.1:13131"
    models_dir: str = "~/.cache/cortex/models"
    sources: tuple[str, ...] = ("local", "hf", "pypi")
    node_token: str | None = None
    body_limit_mb: _AtLeastOne = 64
    memory_limit_mb: _AtLeastOne | None = None
    default_models: tuple[DefaultModel, ...] = ()
    harness: HarnessSection = HarnessSection()
    admission: AdmissionSection = AdmissionSection()
    prefix_cache: PrefixCacheSection = PrefixCacheSection()


C = TypeVar("C", bound=_Section)

RENAMED: Final[Mapping[str, str]] = {
    "nodes": "write [[neurons]] with name and endpoint",
    "neurons.vram_mb": "leave it out: a node reports its own hardware",
    "neurons.pinned": "set pin or pinned_on at the model in models.toml",
    "entitlements": "write [[keys]] with name and key; gateway.allow_anonymous opens it without keys",
    "upstream": "leave it out: there is no remote budget authority; keys are [[keys]] in this file",
    "models.residency_priority": "write priority",
    "port": 'write listen = "0.0.0.0:13131"',
    "harnesses": "leave it out: installed engines register themselves",
    "harness.candle": "write [harness.torch]",
}
"""Keys of the original system that are refused with what to write instead."""

CLI_VARIABLES: Final = frozenset({"CORTEX_ENDPOINT", "CORTEX_API_KEY"})


def load_gateway(path: Path | None, environ: Mapping[str, str] = os.environ) -> GatewayConfig:
    """`cortex.toml`, or the defaults without a path; `CORTEX_SECTION__KEY` wins. Raises ConfigError."""
    config = _load(GatewayConfig, path, "CORTEX_", environ)
    _refuse_twice(path, "neurons: the name", [node.name for node in config.neurons])
    for node in config.neurons:
        if not node.endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                f"{path}: neurons.{node.name}.endpoint: expected a URL such as http://beast:13131, "
                f"got {node.endpoint!r}."
            )
        _refuse_unsendable(path, f"neurons.{node.name}.node_token", node.node_token)
    for key in config.keys:
        _refuse_unsendable(path, f"keys.{key.name}.key", key.key)
    return config


def load_neuron(path: Path | None, environ: Mapping[str, str] = os.environ) -> NeuronConfig:
    """`neuron.toml`, or the defaults without a path; `NEURON_SECTION__KEY` wins. Raises ConfigError."""
    config = _load(NeuronConfig, path, "NEURON_", environ)
    _refuse_twice(path, "default_models: the model_id", [model.model_id for model in config.default_models])
    _refuse_unsendable(path, "node_token", config.node_token)
    return config


def _refuse_unsendable(path: Path | None, what: str, secret: str | None) -> None:
    """For what clients send in a header, which knows no more. The error does not show the secret."""
    if secret is not None and not (secret.isascii() and secret.isprintable() and secret == secret.strip()):
        raise ConfigError(
            f"{path or 'environment'}: {what}: it is sent in a header: write ASCII letters, digits and signs,"
            " without a space at either end."
        )


def _refuse_twice(path: Path | None, what: str, names: list[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"{path}: {what} {name!r} is used twice; each must differ.")


def load_models(config: GatewayConfig, config_path: Path | None) -> ModelsConfig:
    """The catalogue that `models_config` names, else `models.toml` beside the config file if there is one.

    A relative path counts from the config file's directory. Raises ConfigError, also when a named file
    is missing: an empty catalogue must never come from a typing error.
    """
    base = config_path.parent if config_path else Path()
    if config.models_config is not None:
        return _load(ModelsConfig, base / Path(config.models_config).expanduser(), None, {})
    beside = base / "models.toml"
    return _load(ModelsConfig, beside, None, {}) if config_path and beside.exists() else ModelsConfig()


def _load(kind: type[C], path: Path | None, prefix: str | None, environ: Mapping[str, str]) -> C:
    plain: dict[str, Any] = {}
    if path is not None:
        try:
            plain = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{path}: there is no such file.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}.") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{path}: not valid TOML: {error}.") from None
    refuse_unknown(kind, plain, str(path))
    if prefix is not None:
        _overlay(kind, plain, prefix, environ)
    try:
        return msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at ")
        key = where.strip("`").removeprefix("$").lstrip(".") or "top level"
        source = str(path) if path else f"environment ({prefix}…)"
        raise ConfigError(f"{source}: {key}: {message[:1].lower()}{message[1:]}.") from None


def refuse_unknown(kind: type[_Section], plain: Mapping[str, Any], source: str, at: str = "") -> None:
    """Raises ConfigError at the first key that `kind` does not have, with the nearest one it has."""
    hints = get_type_hints(kind)
    for name, value in plain.items():
        path = f"{at}.{name}" if at else name
        if name not in hints:
            raise ConfigError(f"{source}: {path}: {_advice(name, path, list(hints))}")
        section = _section_of(hints[name])
        if section is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                refuse_unknown(section, item, source, path)


def _advice(name: str, path: str, known: list[str]) -> str:
    if path in RENAMED:
        return f"not a key here; {RENAMED[path]}."
    near = difflib.get_close_matches(name, known, 1, 0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."
    return f"unknown key; {hint}"


def _section_of(hint: Any) -> type[_Section] | None:
    """The Section type inside a hint such as `tuple[X, ...]` or `X | None`."""
    if isinstance(hint, type) and issubclass(hint, _Section):
        return hint
    for inner in get_args(hint):
        found = _section_of(inner)
        if found is not None:
            return found
    return None


def _overlay(kind: type[_Section], plain: dict[str, Any], prefix: str, environ: Mapping[str, str]) -> None:
    """Lay `PREFIX_A__B=value` over `plain`. A value that reads as TOML is that, else a string."""
    top = get_type_hints(kind)
    for variable, text in environ.items():
        if not variable.startswith(prefix) or variable in CLI_VARIABLES:
            continue
        path = variable.removeprefix(prefix).lower().split("__")
        if len(path) == 1 and path[0] not in top:
            continue  # somebody else's variable that happens to share the prefix
        branch: Any = plain
        for step in path[:-1]:
            branch = branch.setdefault(step, {})
            if not isinstance(branch, dict):
                raise ConfigError(f"environment {variable}: {step} is a list; set it in the file.")
        branch[path[-1]] = _toml_value(text)
        nested: dict[str, Any] = {}
        leaf = nested
        for step in path[:-1]:
            leaf = leaf.setdefault(step, {})
        leaf[path[-1]] = branch[path[-1]]
        refuse_unknown(kind, nested, f"environment {variable}")


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def all_keys(kind: type[_Section], at: str = "") -> list[str]:
    """Every key path of a configuration, `section.key`; lists of sections without an index."""
    paths = []
    for name, hint in get_type_hints(kind).items():
        path = f"{at}.{name}" if at else name
        section = _section_of(hint)
        paths += all_keys(section, path) if section else [path]
    return paths
