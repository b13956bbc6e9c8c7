"""Rules on who may import whom."""

from __future__ import annotations

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from house.source import Tree, top, within


@dataclass(frozen=True)
class Part:
    """One part of the house: what of its own package it may import. Itself it always may.

    A name that ends in "!" is that module alone, without what lies below it. `roots` are modules of the
    part that may import more (a composition root), each with what.
    """

    name: str
    sees: tuple[str, ...] = ()
    roots: Mapping[str, tuple[str, ...]] | None = None


def directions(tree: Tree, parts: Sequence[Part], package: str) -> list[str]:
    """Imports of the own package that no part allows, and modules that belong to no part.

    The part with the longest matching name decides.
    """
    violations = []
    for module in tree.under(package):
        part = _part_of(module.name, parts)
        if part is None:
            violations.append(f"{module.name}: belongs to no part of the house; add it to the table")
            continue
        allowed = (*part.sees, *(part.roots or {}).get(module.name, ()))
        for found in tree.imports(module):
            if top(found.target) != package or found.target == module.name:
                continue
            own = _part_of(found.target, parts) == part
            if not own and not any(_is(found.target, name) for name in allowed):
                violations.append(f"{module.at(found.line)}: {part.name} may not import {found.target}")
    return violations


def lazy_own_imports(tree: Tree, package: str, allowed: Collection[str]) -> list[str]:
    """Imports of the own package inside functions, outside the `allowed` packages."""
    return [
        f"{module.at(found.line)}: imports {found.target} inside a function"
        for module in tree.under(package)
        if not any(within(module.name, part) for part in allowed)
        for found in tree.imports(module)
        if found.in_function and top(found.target) == package
    ]


BY_NAME = {"import_module", "__import__", "run_module", "run_path", "resolve_name"}


def by_name_imports(tree: Tree, package: str, allowed: Collection[str]) -> list[str]:
    """Uses of the functions that import a module by its name, outside the `allowed` modules."""
    violations = []
    for module in tree.under(package):
        if module.name in allowed:
            continue
        for node in ast.walk(module.tree):
            name = getattr(node, "attr", None) or getattr(node, "id", None)
            if isinstance(node, ast.Attribute | ast.Name) and name in BY_NAME:
                violations.append(f"{module.at(node.lineno)}: imports by name ({name})")
    return violations


def outsiders(tree: Tree, package: str, forbidden: Collection[str]) -> list[str]:
    """Imports of packages that have no place in the sources, or inside this part of them."""
    return [
        f"{module.at(found.line)}: imports {found.target}"
        for module in tree.under(package)
        for found in tree.imports(module)
        if top(found.target) in forbidden
    ]


def only_in(tree: Tree, package: str, outsider: str, allowed: Collection[str]) -> list[str]:
    """Imports of `outsider` in modules that lie in none of `allowed`, in functions included."""
    return [
        f"{module.at(found.line)}: imports {found.target}, which only {', '.join(sorted(allowed))} may"
        for module in tree.under(package)
        if not any(within(module.name, part) for part in allowed)
        for found in tree.imports(module)
        if top(found.target) == outsider
    ]


def never_reaches(tree: Tree, starts: Collection[str], outsiders: Collection[str]) -> list[str]:
    """Starts from which imports lead to one of `outsiders`, with the way."""
    violations = []
    for start in starts:
        asked = tree.reach(start)
        for outsider in sorted(set(outsiders) & {top(name) for name in asked}):
            name = next(name for name in asked if top(name) == outsider)
            way = [name]
            while asked[way[-1]]:
                way.append(asked[way[-1]])
            violations.append(f"{start}: reaches {outsider} by {' <- '.join(way)}")
    return violations


def cycles(tree: Tree, package: str) -> list[str]:
    """Groups of modules that import each other, in functions too; imports for types alone do not run."""
    graph = {
        module.name: {
            found.target
            for found in tree.imports(module)
            if found.target in tree.modules and found.target != module.name and not found.for_types
        }
        for module in tree.under(package)
    }
    return [" <-> ".join(sorted(group)) for group in _strongly_connected(graph) if len(group) > 1]


def undeclared(tree: Tree, package: str, known: Mapping[str, str], allowed: Collection[str]) -> list[str]:
    """Imports of distributions that are not among `allowed`.

    `known` maps a top-level import name to its distribution where the two differ.
    """
    return [
        f"{module.at(found.line)}: imports {found.target}, which is no declared dependency here"
        for module in tree.under(package)
        for found in tree.imports(module)
        if known.get(top(found.target), top(found.target)) not in allowed
    ]


def _part_of(name: str, parts: Sequence[Part]) -> Part | None:
    fitting = [part for part in parts if _is(name, part.name)]
    return max(fitting, key=lambda part: len(part.name), default=None)


def _is(name: str, pattern: str) -> bool:
    return name == pattern[:-1] if pattern.endswith("!") else within(name, pattern)


def _strongly_connected(graph: Mapping[str, Collection[str]]) -> list[list[str]]:
    """Tarjan's algorithm; the graph of this house is small enough for recursion."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups: list[list[str]] = []

    def visit(name: str) -> None:
        order[name] = low[name] = len(order)
        stack.append(name)
        for target in graph.get(name, ()):
            if target not in order:
                visit(target)
                low[name] = min(low[name], low[target])
            elif target in stack:
                low[name] = min(low[name], order[target])
        if low[name] == order[name]:
            group = stack[stack.index(name) :]
            del stack[stack.index(name) :]
            groups.append(group)

    for name in graph:
        if name not in order:
            visit(name)
    return groups
