"""Reads a directory of Python sources into modules: name, text, syntax tree, imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path


@dataclass(frozen=True)
class Import:
    """One imported name; `target` is the module it comes from, as exact as the tree can tell."""

    target: str
    name: str
    """What was taken from `target`, "" for the module itself."""
    line: int
    in_function: bool
    for_types: bool
    """It stands under `if TYPE_CHECKING` and never runs."""


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    text: str = field(repr=False)

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text, str(self.path))

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @property
    def lines(self) -> int:
        return len(self.text.splitlines())

    def at(self, line: int) -> str:
        return f"{self.name}:{line}"


class Tree:
    """All modules under `root`, which holds top-level packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.modules: Mapping[str, Module] = {
            module.name: module for module in sorted(_read(root), key=lambda module: module.name)
        }
        self._imports: dict[str, tuple[Import, ...]] = {}

    def __iter__(self) -> Iterator[Module]:
        return iter(self.modules.values())

    def under(self, *parts: str) -> list[Module]:
        """The modules of these packages; "" is all of them."""
        return [module for module in self if any(not part or within(module.name, part) for part in parts)]

    def imports(self, module: Module) -> tuple[Import, ...]:
        """Every import statement of `module`, wherever it stands; relative ones resolved."""
        if module.name not in self._imports:
            self._imports[module.name] = tuple(self._walk(module, module.tree, False, False))
        return self._imports[module.name]

    def _walk(self, module: Module, node: ast.AST, in_function: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(alias.name, "", child.lineno, in_function, for_types)
            elif isinstance(child, ast.ImportFrom):
                origin = _origin(module, child)
                for alias in child.names:
                    whole = f"{origin}.{alias.name}"
                    if whole in self.modules:
                        yield Import(whole, "", child.lineno, in_function, for_types)
                    else:
                        yield Import(origin, alias.name, child.lineno, in_function, for_types)
            inner = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from self._walk(module, child, inner, for_types or _is_for_types(child))

    def reach(self, start: str) -> dict[str, str]:
        """Everything that importing `start` imports: each module with the one that first asked for it.

        Counts what runs at import time, the packages above each module included; of modules outside
        the tree only their names appear.
        """
        asked: dict[str, str] = {start: ""}
        waiting = [start]
        while waiting:
            name = waiting.pop()
            wanted = [name.rpartition(".")[0]] if "." in name else []
            if name in self.modules:
                found = self.imports(self.modules[name])
                wanted += [item.target for item in found if not (item.in_function or item.for_types)]
            for target in wanted:
                if target not in asked:
                    asked[target] = name
                    waiting.append(target)
        return asked


def within(name: str, part: str) -> bool:
    """True if the module `name` is `part` or lies in the package `part`."""
    return name == part or name.startswith(part + ".")


def top(name: str) -> str:
    return name.partition(".")[0]


def functions(module: Module) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Every function with its qualified name inside the module."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                name = f"{prefix}{child.name}"
                if not isinstance(child, ast.ClassDef):
                    yield name, child
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, prefix)

    yield from walk(module.tree, "")


def strings(module: Module) -> Iterator[tuple[str, int]]:
    """Every string constant of a module that is no docstring, with its line; f-strings part by part."""
    for node in ast.walk(module.tree):
        body = getattr(node, "body", None)
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Expr) and isinstance(body, list) and child in body:
                continue  # a docstring, or the docstring of an attribute
            text = isinstance(child, ast.Constant) and isinstance(child.value, str)
            if text and not isinstance(node, ast.Expr):
                yield child.value, child.lineno


def _read(root: Path) -> Iterator[Module]:
    for path in root.rglob("*.py"):
        parts = list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        yield Module(".".join(parts), path, path.read_text(encoding="utf-8"))


def _is_for_types(node: ast.AST) -> bool:
    """True for `if TYPE_CHECKING` without an else."""
    if not isinstance(node, ast.If) or node.orelse:
        return False
    return "TYPE_CHECKING" in (getattr(node.test, "id", ""), getattr(node.test, "attr", ""))


def _origin(module: Module, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    base = module.name.split(".")
    keep = len(base) - node.level + (1 if module.is_package else 0)
    return ".".join([*base[:keep], *([node.module] if node.module else [])])
