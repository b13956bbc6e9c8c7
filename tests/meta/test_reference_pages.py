"""The reference pages against the code: nothing may be missing from them, and nothing made up."""

import tomllib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pluggy
import pytest

from cortex import cli, config, hookspecs
from cortex.cli import serving
from cortex.gateway.metrics import DEVICE_READINGS, GatewayMetrics
from cortex.neuron.metrics import NeuronMetrics
from cortex.neuron.text import sampling
from cortex.plugins import load_engine_plugins, load_gateway_plugins
from cortex.testing.scripted import ByteCodec
from cortex.wire import chat, errors
from cortex.wire.node import ModelLoad
from house import code, documents, nothing_in
from house.source import Module, Tree

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "docs" / "reference"
SOURCES = Tree(ROOT / "src")


def page(name: str) -> str:
    return (REFERENCE / name).read_text(encoding="utf-8")


# --- configuration --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("title", "kind", "prefix"),
    [
        ("cortex.toml", config.GatewayConfig, "CORTEX_"),
        ("models.toml", config.ModelsConfig, None),
        ("neuron.toml", config.NeuronConfig, "NEURON_"),
    ],
)
def test_every_key_stands_with_its_variable_and_default(
    title: str, kind: type[config.GatewayConfig], prefix: str | None
) -> None:
    real = code.settings(kind, prefix)
    assert list(real) == config.all_keys(kind)
    text = documents.section(page("configuration.md"), title)
    nothing_in(documents.compare(real, documents.first_codes(text), title))
    told = {row[0].strip("`"): (row[1].strip("`"), row[2].strip("`")) for row in documents.rows(text)}
    wrong = {key: (told[key], real[key]) for key in real if told[key] != real[key]}
    assert wrong == {}, "documented, real"


def test_every_key_of_the_original_that_is_refused_stands_there() -> None:
    text = documents.section(page("configuration.md"), "Keys of the original system")
    nothing_in(documents.compare(config.RENAMED, documents.first_codes(text), "renamed keys"))


def test_the_variables_of_the_command_line_stand_there() -> None:
    text = documents.section(page("configuration.md"), "Variables of the command line")
    nothing_in(documents.compare(config.CLI_VARIABLES, documents.first_codes(text), "variables"))


# --- commands -------------------------------------------------------------------------------------


def every_command() -> dict[str, object]:
    return {**code.commands(cli.main, "cortex"), "neuron": serving.neuron_command}


def test_every_command_has_a_section() -> None:
    titles = [part.title for part in documents.sections(page("commands.md"))]
    documented = [title.strip("`") for title in titles if title.startswith("`")]
    nothing_in(documents.compare(every_command(), documented, "commands.md"))


@pytest.mark.parametrize("name", [name for name in every_command() if name != "neuron"])
def test_every_option_and_argument_stands_in_its_section(name: str) -> None:
    text = next(part.text for part in documents.sections(page("commands.md")) if part.title == f"`{name}`")
    told = [word.split()[0] for found in documents.first_codes(text) for word in found.split(", ")]
    shared = documents.section(page("commands.md"), "Options of several commands")
    for row in documents.rows(shared):
        if f"`{name}`" in row[1]:
            told += [word.split()[0] for word in row[0].strip("`").split(", ")]
    nothing_in(documents.compare(code.parameters(every_command()[name]), told, name))


# --- errors ---------------------------------------------------------------------------------------


def test_every_error_code_stands_with_its_status() -> None:
    statuses = {kind.__name__: kind.status for kind in errors.ERRORS}
    real = {(kind.default_code, kind.status) for kind in errors.ERRORS}
    for name, classes in [*code.error_codes(SOURCES).items(), *code.own_codes(SOURCES).items()]:
        real |= {(name, statuses[kind]) for kind in classes if kind in statuses}
    found = [row for row in documents.rows(page("errors.md")) if row[0].startswith("`")]
    told = [(row[0].strip("`"), int(row[1])) for row in found]
    nothing_in(documents.compare(real, told, "errors.md"))


# --- hooks ----------------------------------------------------------------------------------------

HOOKS = {name for name in vars(hookspecs.CortexHooks) if name.startswith("cortex_")}


def test_every_hook_has_a_section() -> None:
    titles = [part.title for part in documents.sections(page("hooks.md"))]
    told = [title.strip("`").partition("(")[0] for title in titles if title.startswith("`cortex_register")]
    nothing_in(documents.compare(HOOKS, told, "hooks.md"))


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_the_example_of_a_hook_works(hook: str) -> None:
    text = documents.section(page("hooks.md"), f"`{hook}(register)`")
    (example,) = documents.fences(text, "python")
    names: dict[str, object] = {"__name__": "example"}
    exec(compile(example, f"hooks.md: {hook}", "exec"), names)
    plugin = type("Example", (), {hook: staticmethod(names[hook])})()
    engines = hook == "cortex_register_engines"
    load: Callable[..., object] = load_engine_plugins if engines else load_gateway_plugins
    loaded = msgspec.structs.asdict(load([plugin], []))
    added = [found for found in loaded["registrations"] if not found.plugin.startswith("cortex.")]
    assert len(added) == 1


def test_every_hook_is_specified_for_pluggy() -> None:
    manager = pluggy.PluginManager("cortex")
    manager.add_hookspecs(hookspecs.CortexHooks)
    assert set(vars(manager.hook)) - {"_"} >= HOOKS


# --- routes ---------------------------------------------------------------------------------------


def operations() -> list[str]:
    dialects = load_gateway_plugins(found=[]).dialects.values()
    return [f"{item.method} {item.path}" for dialect in dialects for item in dialect.operations]


@pytest.mark.parametrize(
    ("name", "package", "more"),
    [("http.md", "cortex.gateway", operations()), ("neuron-api.md", "cortex.neuron", [])],
)
def test_every_route_stands_on_its_page(name: str, package: str, more: list[str]) -> None:
    real = [*code.routes(SOURCES.under(package)), *more]
    assert len(real) > 5
    told = [found for found in documents.first_codes(page(name)) if found.partition(" ")[2].startswith("/")]
    nothing_in(documents.compare(real, told, name))


# --- metrics --------------------------------------------------------------------------------------


def told_metrics(title: str) -> dict[str, tuple[str, frozenset[str]]]:
    table = documents.rows(documents.section(page("metrics.md"), title))
    found = [row for row in table if row[0].startswith("`")]
    assert len({row[0] for row in found}) == len(found)
    return {row[0].strip("`"): (row[1], frozenset(row[2].split(", ")) - {""}) for row in found}


def test_every_metric_of_the_gateway_stands_with_its_type_and_labels() -> None:
    """All of them are there after one request, one retry and one poll."""
    metrics = GatewayMetrics()
    request = {"request_id": "r", "dialect": "openai", "kind": hookspecs.Kind.CHAT, "model": "m", "node": "n"}
    ended = {"outcome": "ok", "status": 200, "streamed": True, "duration": 1.0, "overhead": 0.1}
    measured = {"time_to_first_token": 0.1, "inter_token_latency": 0.1, "tokens_per_second": 9.0}
    counted = {"prompt_tokens": 1, "completion_tokens": 1, "cached_prompt_tokens": 1, "started": True}
    device = {"index": 0.0} | dict.fromkeys(DEVICE_READINGS, 1.0)
    metrics.on_event(hookspecs.RequestStarted(**request))
    metrics.on_event(hookspecs.RequestRetried(model="m", node="n", reason="busy"))
    metrics.on_event(hookspecs.RequestStarted(**request))
    metrics.on_event(hookspecs.RequestEnded(**request, **ended, **measured, **counted))
    metrics.on_event(hookspecs.NodePolled(node="n", up=True, states={"m": "loaded"}, devices=[device]))
    body, _ = metrics.render()
    assert told_metrics("Gateway") == code.exposition(body.decode())


def test_every_metric_of_the_neuron_stands_with_its_type_and_labels() -> None:
    metrics = NeuronMetrics()
    metrics.first_token("m", 0.1, 5)
    metrics.generated("m", 3, 0.2)
    metrics.refused("busy")
    metrics.loaded("m", 1.0)
    metrics.step("m", hookspecs.EngineStep())
    body, _ = metrics.render([ModelLoad(id="m", cache_usage_ratio=0.0)], "text/plain")
    assert told_metrics("Neuron") == code.exposition(body.decode())


# --- parameters of a chat completion --------------------------------------------------------------

NEUTRAL_AND_NOT = {
    "response_format": ({"type": "text"}, {"type": "json_object"}),
}
SAMPLED = {
    "max_tokens": 7,
    "max_completion_tokens": 7,
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 3,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "logit_bias": {"5": 1.0},
    "logprobs": True,
    "top_logprobs": 3,
    "min_tokens": 4,
    "ignore_eos": True,
}


def chat_parameters() -> dict[str, str]:
    text = documents.section(page("openai.md"), "Parameters of a chat completion")
    return {row[0].strip("`"): row[1] for row in documents.rows(text) if row[0].startswith("`")}


def request_with(**members: object) -> chat.ChatRequest:
    return chat.convert(chat.ChatRequest, {"model": "m", "messages": [{"role": "user"}], **members})


def test_every_parameter_of_a_chat_completion_stands_on_its_page() -> None:
    told = chat_parameters()
    nothing_in(documents.compare(chat.ChatRequest.__struct_fields__, told, "openai.md"))
    assert set(told.values()) == {"honoured", "to the template", "refused", "no effect"}


@pytest.mark.parametrize("name", [name for name, what in chat_parameters().items() if what == "refused"])
def test_a_parameter_that_is_called_refused_is_refused_by_name(name: str) -> None:
    neutral, other = NEUTRAL_AND_NOT[name]
    sampling.refuse_unsupported(request_with(**{name: neutral}))
    with pytest.raises(errors.BadRequest) as refused:
        sampling.refuse_unsupported(request_with(**{name: other}))
    assert refused.value.param == name


@pytest.mark.parametrize("name", SAMPLED)
def test_a_sampling_parameter_that_is_called_honoured_has_an_effect(name: str) -> None:
    assert chat_parameters()[name] == "honoured"
    needed = {"logprobs": True} if name == "top_logprobs" else {}
    plain = sampling.sampling(request_with(**needed), ByteCodec())
    assert sampling.sampling(request_with(**{**needed, name: SAMPLED[name]}), ByteCodec()) != plain


# --- dependencies and modules ---------------------------------------------------------------------


def test_every_dependency_has_its_line() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    real = {line.partition(">")[0].partition("=")[0].strip() for lines in lists for line in lines}
    text = (ROOT / "docs" / "discussion" / "dependencies.md").read_text()
    nothing_in(documents.compare(real, documents.first_codes(text), "dependencies.md"))
    for row in documents.rows(text):
        assert len(row) == 4, row
        assert all(row), row


def test_every_module_stands_on_the_map_with_one_sentence() -> None:
    def is_empty(module: Module) -> bool:
        return module.is_package and len(module.tree.body) <= 1

    top = ROOT / "src" / "cortex"
    real = [str(module.path.relative_to(top)) for module in SOURCES if not is_empty(module)]
    text = (ROOT / "docs" / "map.md").read_text()
    told = [found for found in documents.first_codes(text) if found.endswith(".py")]
    nothing_in(documents.compare(real, told, "map.md"))
    for row in documents.rows(text):
        if row[0].strip("`").endswith(".py"):
            assert row[1].endswith("."), row
            assert 3 <= len(row[1].split()) <= 30, row


def test_the_map_names_only_paths_that_exist() -> None:
    top = ROOT / "src" / "cortex"
    codes = documents.codes((ROOT / "docs" / "map.md").read_text())
    named = [found for found in codes if found.endswith(".py")]
    assert [found for found in named if not (top / found).exists() and not (ROOT / found).exists()] == []
