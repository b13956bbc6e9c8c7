"""Reads out of the code what the reference pages must tell: settings, routes, error codes, options."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_type_hints

import click
import msgspec

from house.source import Module


def settings(kind: type[msgspec.Struct], prefix: str | None) -> dict[str, tuple[str, str]]:
    """Key path -> (environment variable, default) of a configuration Struct, as the page writes them.

    A variable exists only outside lists of sections, and only if the file has a `prefix`; else "".
    A default is JSON, "required" where there is none, "" for None.
    """

    def walk(section: type[msgspec.Struct], at: str, listed: bool) -> Iterator[tuple[str, tuple[str, str]]]:
        hints = get_type_hints(section)
        for found in msgspec.structs.fields(section):
            path = f"{at}.{found.name}" if at else found.name
            inner = _struct_in(hints[found.name])
            if inner is not None:
                yield from walk(inner, path, listed or hints[found.name] is not inner)
                continue
            variable = f"{prefix}{path.upper().replace('.', '__')}" if prefix and not listed else ""
            yield path, (variable, _default(found))

    return dict(walk(kind, "", False))


def _struct_in(hint: Any) -> type[msgspec.Struct] | None:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return hint
    return next(filter(None, map(_struct_in, get_args(hint))), None)


def _default(found: msgspec.structs.FieldInfo) -> str:
    if found.default_factory is not msgspec.NODEFAULT:
        value = found.default_factory()
    elif found.default is not msgspec.NODEFAULT:
        value = found.default
    else:
        return "required"
    if value is None:
        return ""
    if isinstance(value, tuple) and not value:
        return "[]"
    return json.dumps(value)


def routes(modules: Iterable[Module], constructor: str = "Route") -> list[str]:
    """`METHOD path` of every call of `constructor` whose first two arguments are literals."""
    return [
        " ".join(argument.value for argument in call.args[:2])
        for module in modules
        for call in _calls(module, constructor)
        if len(call.args) > 1 and all(_is_text(argument) for argument in call.args[:2])
    ]


def error_codes(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Code -> names of the error classes that are made with it by `SomeError(..., code="...")`."""
    found: dict[str, set[str]] = {}
    for module in modules:
        for call in (node for node in ast.walk(module.tree) if isinstance(node, ast.Call)):
            for keyword in call.keywords:
                if keyword.arg == "code" and _is_text(keyword.value):
                    found.setdefault(keyword.value.value, set()).add(_name(call))
    return found


def own_codes(modules: Iterable[Module]) -> dict[str, set[str]]:
    """Code -> names of the error classes that a class with this `default_code` derives from."""
    found: dict[str, set[str]] = {}
    for module in modules:
        for kind in (node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)):
            for line in kind.body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "default_code":
                    bases = {ast.unparse(base) for base in kind.bases}
                    found.setdefault(ast.literal_eval(line.value), set()).update(bases)
    return found


def parameters(command: click.Command) -> set[str]:
    """The options, each in all its spellings, and the arguments of a command; help is left out."""
    context = click.Context(command)
    found: set[str] = set()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            if not parameter.hidden:
                found.update(parameter.opts, parameter.secondary_opts)
        else:
            found.add(parameter.make_metavar(context).strip("[]."))
    return found


def commands(group: click.Command, name: str) -> dict[str, click.Command]:
    """Every command below a group by the words that a person types."""
    found = {name: group}
    if isinstance(group, click.Group):
        context = click.Context(group)
        for word in group.list_commands(context):
            inner = group.get_command(context, word)
            assert inner is not None
            found.update(commands(inner, f"{name} {word}"))
    return found


def exposition(text: str) -> dict[str, tuple[str, frozenset[str]]]:
    """Metric -> (type, names of its labels) of a Prometheus text; a histogram's own `le` left out."""
    types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    labels: dict[str, set[str]] = {name: set() for name in types}
    for name, inside in re.findall(r"^(\w+)\{(.*)\} \S+$", text, re.MULTILINE):
        owner = next((known for known in (name, name.rpartition("_")[0]) if known in types), None)
        if owner is not None:
            labels[owner] |= set(re.findall(r'(\w+)="', inside)) - {"le"}
    return {name: (types[name], frozenset(labels[name])) for name in types}


def _calls(module: Module, name: str) -> Iterator[ast.Call]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Call) and _name(node) == name:
            yield node


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", None) or getattr(call.func, "id", "")


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)
