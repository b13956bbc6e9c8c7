"""Where chat templates run: jinja as transformers sets it up, with bounds on work and size.

A template is part of a model file, so it is a stranger's program. It reaches no Python internals, and
one that runs away (endless loops, texts that double) is stopped. Knows nothing of conversations.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as loop_controls
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_TEXT: Final = 32 * 2**20
"""Characters of the rendered prompt, and of any text on the way to it."""
MAX_STEPS: Final = 2_000_000
"""Rounds of loops and calls in one rendering."""
_MAX_INTEGER_BITS: Final = 4096
_WIDE_FORMAT: Final = re.compile(r"%[^%a-zA-Z]*(\d{5}|\*)")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one template. Rendering is safe from several threads at once."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loop_controls])
        self._now = now
        self._local = threading.local()
        self.filters["tojson"] = _to_json
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=self._strftime_now,
            dict=_make_dict,
            namespace=_Names,
        )

    def compile_bounded(self, source: str) -> Template:
        """Raises jinja2.TemplateSyntaxError."""
        tree = self.parse(source)
        tree = _Metered().visit(tree)
        tree.set_environment(self)
        return self.from_string(tree)

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Raises whatever the template does; SecurityError where a bound is reached."""
        self._local.steps = 0
        size = 0
        parts = []
        for part in template.generate(variables):
            size += len(part)
            _bound(size)
            parts.append(part)
        return "".join(parts)

    def step(self) -> str:
        """Called by compiled templates once a round of a loop; the count is made in `call`."""
        return ""

    def concat_text(self, *parts: Any) -> str:
        """The `~` operator."""
        texts = [str(part) for part in parts]
        _bound(sum(map(len, texts)))
        return "".join(texts)

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        local = __self._local
        local.steps = getattr(local, "steps", 0) + 1
        if local.steps > MAX_STEPS:
            raise SecurityError(f"it takes more than {MAX_STEPS} steps")
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and _sized(left) and _sized(right):
            _bound(len(left) + len(right))
        elif operator == "*":
            for items, times in ((left, right), (right, left)):
                if _sized(items) and isinstance(times, int):
                    _bound(len(items) * times)
            if isinstance(left, int) and isinstance(right, int):
                _bound_integer(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            _bound_integer(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
            raise SecurityError("it formats to a very wide field")
        return super().call_binop(context, operator, left, right)

    def _strftime_now(self, format: str) -> str:
        return self._now().strftime(format)


class _Metered(NodeTransformer):
    """Makes every round of a loop, and every `~`, a call that the sandbox sees."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("step", [], node.lineno)).set_lineno(node.lineno))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Call:
        self.generic_visit(node)
        return _call("concat_text", node.nodes, node.lineno)


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    call = nodes.Call(nodes.EnvironmentAttribute(method), arguments, [], None, None)
    call.set_lineno(line)
    return call


class _Generation(Extension):
    """`{% generation %}`: marks for training what the assistant said; here its content is all."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Names(Namespace):
    """`namespace()` without underscore names, which could reach into the object itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        names = dict(*rest, **kwargs)
        for name in names:
            _check_name(name)
        Namespace.__init__(self, names)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _make_dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers defines it: jinja's own filter escapes HTML and sorts."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: Any) -> NoReturn:
    raise TemplateError(str(message))


def _sized(value: Any) -> bool:
    return isinstance(value, str | list | tuple)


def _bound(size: int) -> None:
    if size > MAX_TEXT:
        raise SecurityError(f"it makes more than {MAX_TEXT} characters")


def _bound_integer(bits: int) -> None:
    if bits > _MAX_INTEGER_BITS:
        raise SecurityError("it computes with huge integers")
