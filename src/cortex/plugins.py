"""Finds plugins and collects what they register: dialects, eviction strategies, observers, engines.

The only place that loads plugin code, once at start-up. Knows names, not what the objects do.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Protocol, TypeVar

import msgspec
import pluggy

from cortex.hookspecs import CortexHooks, Dialect, EngineFactory, EvictionStrategy, Observer

GATEWAY_GROUP: Final = "cortex"
ENGINE_GROUP: Final = "cortex.engines"
BUILT_IN: Final[tuple[str, ...]] = ("cortex.harnesses.openai",)


class PluginError(Exception):
    """A plugin that cannot be used; start-up stops. Names the distribution at fault."""


class _Named(Protocol):
    @property
    def name(self) -> str: ...


T = TypeVar("T", bound=_Named)


class Registration(msgspec.Struct, frozen=True):
    """One registered object and the plugin that brought it."""

    kind: str
    name: str
    plugin: str


class GatewayPlugins(msgspec.Struct, frozen=True, kw_only=True):
    dialects: dict[str, Dialect]
    eviction_strategies: dict[str, EvictionStrategy]
    observers: dict[str, Observer]
    registrations: list[Registration]


class EnginePlugins(msgspec.Struct, frozen=True, kw_only=True):
    engines: dict[str, EngineFactory]
    registrations: list[Registration]


def load_gateway_plugins(
    extra: Iterable[object] = (), found: Iterable[EntryPoint] | None = None
) -> GatewayPlugins:
    """Built-in plugins, installed ones (entry-point group `cortex`), then `extra`. Raises PluginError."""
    manager = _manager(GATEWAY_GROUP, BUILT_IN, extra, found)
    registrations: list[Registration] = []
    return GatewayPlugins(
        dialects=_collect(manager, "cortex_register_dialects", "dialect", registrations),
        eviction_strategies=_collect(
            manager, "cortex_register_eviction_strategies", "eviction strategy", registrations
        ),
        observers=_collect(manager, "cortex_register_observers", "observer", registrations),
        registrations=registrations,
    )


def load_engine_plugins(
    extra: Iterable[object] = (), found: Iterable[EntryPoint] | None = None
) -> EnginePlugins:
    """Installed engines (entry-point group `cortex.engines`), then `extra`. Raises PluginError."""
    manager = _manager(ENGINE_GROUP, (), extra, found)
    registrations: list[Registration] = []
    engines = _collect(manager, "cortex_register_engines", "engine", registrations)
    return EnginePlugins(engines=engines, registrations=registrations)


def _manager(
    group: str, built_in: Iterable[str], extra: Iterable[object], found: Iterable[EntryPoint] | None
) -> pluggy.PluginManager:
    manager = pluggy.PluginManager("cortex")
    manager.add_hookspecs(CortexHooks)
    for module in built_in:
        manager.register(importlib.import_module(module), name=module)
    for entry in entry_points(group=group) if found is None else found:
        distribution = entry.dist.name if entry.dist else "an unknown distribution"
        name = f"{distribution} ({entry.name})"
        try:
            plugin = entry.load()
            manager.register(plugin, name=name)
        except Exception as error:
            raise PluginError(f"plugin {name} cannot be loaded: {error!r}; repair or uninstall it") from error
    for plugin in extra:
        manager.register(plugin, name=f"{type(plugin).__module__}.{type(plugin).__qualname__}")
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        raise PluginError(f"plugin {manager.get_name(error.plugin)}: {error}") from None
    return manager


def _collect(
    manager: pluggy.PluginManager, hook: str, kind: str, registrations: list[Registration]
) -> dict[str, Any]:
    """Call `hook` plugin by plugin, so that a fault or a name used twice can be laid at one door."""
    found: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for implementation in getattr(manager.hook, hook).get_hookimpls():
        plugin = implementation.plugin_name
        if inspect.iscoroutinefunction(implementation.function):
            raise PluginError(f"plugin {plugin}: {hook} must be a plain function, not a coroutine function")
        register = _registrar(found, origin, plugin, kind)
        try:
            implementation.function(register)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(f"plugin {plugin}: {hook} failed: {error!r}") from error
    registrations += [Registration(kind, name, origin[name]) for name in found]
    return found


def _registrar(found: dict[str, T], origin: dict[str, str], plugin: str, kind: str) -> Callable[[T], None]:
    def register(item: T) -> None:
        if item.name in found:
            raise PluginError(
                f"plugin {plugin}: the {kind} name {item.name!r} is taken by {origin[item.name]}; "
                f"uninstall one of the two"
            )
        found[item.name] = item
        origin[item.name] = plugin

    return register
