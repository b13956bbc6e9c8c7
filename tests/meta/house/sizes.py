"""Ceilings, names and words: rules on a module by itself."""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from house.source import Module, Tree, functions, within


@dataclass(frozen=True)
class Excess:
    """An exception from a ceiling: the module, or `module:function`, its own ceiling and why."""

    where: str
    ceiling: int
    reason: str


def too_long(
    modules: Iterable[Module], file_ceiling: int, function_ceiling: int, exceptions: Sequence[Excess]
) -> list[str]:
    """Files and functions over their ceiling, and exceptions that lack a reason or are not needed."""
    allowed = {exception.where: exception.ceiling for exception in exceptions}
    measured: dict[str, tuple[int, int]] = {}
    for module in modules:
        measured[module.name] = (module.lines, file_ceiling)
        for name, node in functions(module):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            measured[f"{module.name}:{name}"] = (lines, function_ceiling)
    violations = [
        f"{where}: {lines} lines, the ceiling is {allowed.get(where, ceiling)}"
        for where, (lines, ceiling) in measured.items()
        if lines > allowed.get(where, ceiling)
    ]
    for exception in exceptions:
        lines, ceiling = measured.get(exception.where, (0, 0))
        if len(exception.reason.split()) < 3:
            violations.append(f"{exception.where}: its exception gives no reason")
        if lines <= ceiling:
            violations.append(f"{exception.where}: its exception is not needed any more")
    return violations


def forbidden_names(modules: Iterable[Module], forbidden: Collection[str]) -> list[str]:
    """Modules and packages whose own name says nothing."""
    return [
        f"{module.name}: a name that says nothing"
        for module in modules
        if module.name.rpartition(".")[2] in forbidden
    ]


def without_docstring(modules: Iterable[Module]) -> list[str]:
    return [f"{module.name}: has no docstring" for module in modules if not ast.get_docstring(module.tree)]


def word_outside(tree: Tree, package: str, word: str, allowed: Collection[str]) -> list[str]:
    """Places outside the `allowed` modules and packages that hold `word`, whatever its case."""
    return [
        f"{module.at(number)}: says {word!r}"
        for module in tree.under(package)
        if not any(within(module.name, part) for part in allowed)
        for number, line in enumerate(module.text.splitlines(), 1)
        if word.lower() in line.lower()
    ]


def matches(paths: Iterable[Path], root: Path, patterns: Sequence[tuple[str, str]]) -> list[str]:
    """Lines of text files that match one of the (pattern, what it is); binary files are passed over."""
    violations = []
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            violations += [
                f"{path.relative_to(root)}:{number}: {meaning}: {found[0]}"
                for pattern, meaning in patterns
                if (found := re.search(pattern, line))
            ]
    return violations
