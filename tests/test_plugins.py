"""Plugins: what they register arrives, and a broken one is named and stops the start."""

from importlib.metadata import EntryPoint

import pytest

from cortex import hookimpl
from cortex.plugins import PluginError, load_engine_plugins, load_gateway_plugins
from cortex.testing import ScriptedFactory


class Named:
    def __init__(self, name):
        self.name = name


class DialectPlugin:
    def __init__(self, *names):
        self.names = names

    @hookimpl
    def cortex_register_dialects(self, register):
        for name in self.names:
            register(Named(name))


def test_built_ins_come_through_the_hooks():
    plugins = load_gateway_plugins(found=())
    assert list(plugins.dialects) == ["openai"]
    assert plugins.registrations[0].plugin == "cortex.harnesses.openai"


def test_a_strangers_dialect_is_registered():
    assert "mine" in load_gateway_plugins([DialectPlugin("mine")], found=()).dialects


def test_a_name_used_twice_is_refused():
    with pytest.raises(PluginError, match=r"'openai' is taken by cortex\.harnesses\.openai"):
        load_gateway_plugins([DialectPlugin("openai")], found=())


def test_an_entry_point_that_cannot_be_loaded_is_named():
    entry = EntryPoint(name="broken", value="no_such_module_at_all:plugin", group="cortex")
    with pytest.raises(PluginError, match=r"broken.*no_such_module_at_all"):
        load_gateway_plugins(found=[entry])


def test_a_misspelt_hook_is_refused():
    class Misspelt:
        @hookimpl
        def cortex_register_dialect(self, register):
            raise AssertionError

    with pytest.raises(PluginError, match="cortex_register_dialect"):
        load_gateway_plugins([Misspelt()], found=())


def test_a_coroutine_hook_is_refused():
    class Async:
        @hookimpl
        async def cortex_register_dialects(self, register):
            raise AssertionError

    with pytest.raises(PluginError, match="coroutine"):
        load_gateway_plugins([Async()], found=())


def test_a_hook_that_raises_is_laid_at_its_plugins_door():
    class Raises:
        @hookimpl
        def cortex_register_observers(self, register):
            raise ValueError("no")

    with pytest.raises(PluginError, match=r"Raises.*ValueError\('no'\)|cortex_register_observers failed"):
        load_gateway_plugins([Raises()], found=())


def test_engines_are_registered_for_neurons():
    class Engines:
        @hookimpl
        def cortex_register_engines(self, register):
            register(ScriptedFactory())

    assert list(load_engine_plugins([Engines()], found=()).engines) == ["scripted"]
