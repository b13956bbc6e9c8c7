"""The reading of code itself: what a page must tell has to be found, whatever its form."""

from pathlib import Path

import click
import msgspec

from house import code
from house.source import Module


class Inner(msgspec.Struct):
    size: int = 3
    word: str | None = None


class Item(msgspec.Struct):
    name: str
    tags: tuple[str, ...] = ()


class Outer(msgspec.Struct):
    inner: Inner = msgspec.field(default_factory=Inner)
    items: tuple[Item, ...] = ()
    on: bool = False


def module(text: str) -> Module:
    return Module("pkg.a", Path("a.py"), text)


def test_settings_have_path_variable_and_default() -> None:
    assert code.settings(Outer, "APP_") == {
        "inner.size": ("APP_INNER__SIZE", "3"),
        "inner.word": ("APP_INNER__WORD", ""),
        "items.name": ("", "required"),
        "items.tags": ("", "[]"),
        "on": ("APP_ON", "false"),
    }


def test_without_a_prefix_there_are_no_variables() -> None:
    assert {variable for variable, _ in code.settings(Outer, None).values()} == {""}


def test_routes_are_literal_calls() -> None:
    text = 'Route("GET", "/a", f), web.Route("POST", "/b/{id}", f), Route(m, "/c", f), Other("GET", "/d")'
    assert code.routes([module(text)]) == ["GET /a", "POST /b/{id}"]


def test_error_codes_are_found_with_their_classes() -> None:
    text = 'raise Conflict("x", code="held")\nerrors.Busy("y", code="held")\nBusy(code=name)'
    assert code.error_codes([module(text)]) == {"held": {"Conflict", "Busy"}}


def test_parameters_are_options_in_all_spellings_and_arguments() -> None:
    @click.command()
    @click.argument("model")
    @click.argument("rest", nargs=-1)
    @click.option("-c", "--config")
    @click.option("--colour/--no-colour")
    @click.option("--secret", hidden=True)
    def command() -> None:
        pass

    assert code.parameters(command) == {"MODEL", "REST", "-c", "--config", "--colour", "--no-colour"}


def test_commands_are_walked_to_the_leaves() -> None:
    @click.group()
    def group() -> None:
        pass

    @group.group()
    def deep() -> None:
        pass

    @deep.command()
    def leaf() -> None:
        pass

    assert list(code.commands(group, "app")) == ["app", "app deep", "app deep leaf"]


def test_an_exposition_gives_types_and_labels() -> None:
    text = (
        "# HELP a_total A.\n# TYPE a_total counter\n"
        'a_total{model="m",node="n"} 1\n'
        "# TYPE b_seconds histogram\n"
        'b_seconds_bucket{le="1",model="m"} 1\nb_seconds_sum{model="m"} 1\n'
        "# TYPE c gauge\nc 2\n"
    )
    assert code.exposition(text) == {
        "a_total": ("counter", frozenset({"model", "node"})),
        "b_seconds": ("histogram", frozenset({"model"})),
        "c": ("gauge", frozenset()),
    }
