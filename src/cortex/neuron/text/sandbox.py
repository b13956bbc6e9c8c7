"""Where chat templates run: jinja as transformers sets it up, with bounds on work and size.

A template is part of a model file, so it is a stranger's program. It reaches no Python internals, and
one that runs away (endless loops, texts that double) is stopped. Knows nothing of conversations.
"""

from __future__ import annotations

import functools
import json
import threading
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final, NoReturn, cast

from jinja2 import Template, TemplateError, TemplateSyntaxError, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.ext import loopcontrols as loop_controls
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace, _PassArg, pass_context

from cortex.neuron.text import growth
from cortex.neuron.text.account import Account, bound, bound_integer

MAX_SOURCE: Final = 2**18
"""Characters of a template. Compiling takes ten seconds and 2 GB for a million."""
_CLOSED: Final = frozenset({"encode", "mapping", "to_bytes", "translate"})
"""Attributes of values that would lead to kinds of values, or to sizes, that nothing here measures."""


class _Metered(CodeGenerator):
    """Makes what templates do without a call or a filter visible to the sandbox."""

    def blockvisit(self, nodes: Iterable[nodes.Node], frame: Frame) -> None:
        if frame.loop_frame:
            self.writeline("environment.step()")
        super().blockvisit(nodes, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat_text(")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write(")")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        if isinstance(node.arg, nodes.Slice):
            self._wrap("sliced", super().visit_Getitem, node, frame)
        else:
            super().visit_Getitem(node, frame)

    def signature(self, node: Any, frame: Frame, extra_kwargs: Mapping[str, Any] | None = None) -> None:
        if node.dyn_args is not None:
            spread = nodes.EnvironmentAttribute("spread")
            node.dyn_args = nodes.Call(spread, [node.dyn_args], [], None, None)
        super().signature(node, frame, extra_kwargs)

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._visit_literal(super().visit_List, node, node.items, frame)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        if node.ctx == "load":
            self._visit_literal(super().visit_Tuple, node, node.items, frame)
        else:
            super().visit_Tuple(node, frame)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        parts = [part for pair in node.items for part in (pair.key, pair.value)]
        self._visit_literal(super().visit_Dict, node, parts, frame)

    def visit_ScopedEvalContextModifier(self, node: nodes.ScopedEvalContextModifier, frame: Frame) -> None:
        self.fail("prompts are no HTML, so nothing is escaped", node.lineno)

    def _visit_literal(
        self, visit: Callable[[Any, Frame], None], node: nodes.Expr, parts: list[nodes.Expr], frame: Frame
    ) -> None:
        if all(isinstance(part, nodes.Const) for part in parts):
            visit(node, frame)
        else:
            self._wrap("made", visit, node, frame)

    def _wrap(self, method: str, visit: Callable[[Any, Frame], None], node: nodes.Expr, frame: Frame) -> None:
        self.write(f"environment.{method}(")
        visit(node, frame)
        self.write(")")


class Sandbox(ImmutableSandboxedEnvironment):
    """An environment for one template. Rendering is safe from several threads at once.

    What is large or slow by its arguments is measured before it is made (`growth`), and everything that
    is made is counted (`Account`). Outside a rendering there is no account, so jinja cannot compute
    anything large while it compiles: it folds constants, and leaves those that raise for later.
    """

    code_generator_class = _Metered
    intercepted_binops = frozenset({"+", "-", "*", "**", "%"})

    def __init__(self, now: Callable[[], datetime]) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loop_controls])
        self._now = now
        self._local = threading.local()
        self.finalize = self.text
        self.filters.update(tojson=_to_json, join=self._join, sum=self._sum)
        for name, function in self.filters.items():
            self.filters[name] = self._meter(name, function)
        del self.globals["lipsum"]
        self.globals.update(
            raise_exception=_raise_exception,
            strftime_now=self._strftime_now,
            dict=_make_dict,
            namespace=_Names,
        )

    def compile_bounded(self, source: str) -> Template:
        """Raises jinja2.TemplateSyntaxError."""
        if len(source) > MAX_SOURCE:
            raise TemplateSyntaxError(f"it is longer than {MAX_SOURCE} characters", 1)
        return self.from_string(source)

    def render(self, template: Template, variables: Mapping[str, Any]) -> str:
        """Raises whatever the template does; SecurityError where a bound is reached."""
        self._local.account = Account()
        try:
            size = 0
            parts = []
            # Not `generate`: it ties errors into cycles with the frames, which hold all that was made.
            for part in template.root_render_func(template.new_context(dict(variables))):
                size += len(part)
                bound(size)
                parts.append(part)
            return "".join(parts)
        finally:
            del self._local.account

    # --- what compiled templates call -------------------------------------------------------------

    def step(self) -> None:
        """At the beginning of every round of a loop."""
        self._local.account.step()

    def text(self, value: Any) -> str:
        """Every value on its way into a text."""
        if type(value) is str:
            return value
        text = str(value)
        self._local.account.take(len(text))
        return text

    def concat(self, parts: Iterable[str]) -> str:
        """What macros and the blocks of `set`, `call` and `filter` have put out."""
        texts = list(parts)
        self._local.account.take(sum(map(len, texts)))
        return "".join(texts)

    def concat_text(self, *parts: Any) -> str:
        """The `~` operator."""
        return self.concat(map(self.text, parts))

    def made(self, value: Any) -> Any:
        """Every list, tuple and dict that a template writes down."""
        self._local.account.made(value)
        return value

    def sliced(self, value: Any) -> Any:
        """Every slice. It is not weighed, for what it was taken from is heavier."""
        self._local.account.take(len(value))
        return value

    def spread(self, value: Any) -> Any:
        """What a template hands over as `*value`."""
        bound(growth.scattered(value))
        return value

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        account = __self._local.account
        account.step()
        owner = getattr(__obj, "__self__", None)
        if isinstance(owner, str):
            if __obj.__name__ == "join":  # of items that may come only once
                args = tuple(item if isinstance(item, str) else list(item) for item in args)
            size = growth.METHODS.get(__obj.__name__)
            if size is not None:
                bound(size(account, owner, *args, **_named(kwargs)))
        elif not isinstance(__obj, Macro) or __obj.catch_varargs or __obj.catch_kwargs:
            bound(sum(map(account.weigh, (*args, *_named(kwargs).values()))))
        result = super().call(__context, __obj, *args, **kwargs)
        account.made(result)
        return result

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        account = self._local.account
        if operator == "+" and type(left) is str and type(right) is str:
            account.take(len(left) + len(right))
            return left + right
        if operator == "+" and _sized(left) and _sized(right):
            bound(account.weigh(left) + account.weigh(right))
            result = left + right
            account.joined(left, right, result)
            return result
        if operator == "*":
            for items, times in ((left, right), (right, left)):
                if _sized(items) and isinstance(times, int):
                    bound((len(items) if isinstance(items, str) else account.weigh(items)) * times)
            if isinstance(left, int) and isinstance(right, int):
                bound_integer(left.bit_length() + right.bit_length())
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            bound_integer(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            bound(growth.percent(account, left, right))
        result = super().call_binop(context, operator, left, right)
        account.made(result)
        return result

    # --- what templates reach ---------------------------------------------------------------------

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if attr in _CLOSED and not isinstance(obj, Namespace):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text: str = value.__self__
        escape = getattr(text, "escape", None)  # what `safe` has marked escapes what it is given
        formatter = _EscapeFormatter(self, escape=escape) if escape else _Formatter(self)

        def format(*args: Any, **kwargs: Any) -> str:
            if value.__name__ == "format_map":
                (kwargs,), args = args, ()
            return type(text)(formatter.vformat(text, args, kwargs))

        return format

    def _meter(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        size = growth.FILTERS.get(name)
        own = 0 if _PassArg.from_obj(function) is None else 1  # arguments that are jinja's

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            account = self._local.account
            account.step()
            if size is not None:
                bound(size(account, *args[own:], **kwargs))
            result = function(*args, **kwargs)
            account.made(result)
            return result

        return metered

    def _join(self, value: Iterable[Any], d: Any = "", attribute: str | int | None = None) -> str:
        if attribute is not None:
            value = map(make_attrgetter(self, attribute), value)
        texts = list(map(self.text, value))
        bound(sum(map(len, texts)) + len(str(d)) * len(texts))
        return str(d).join(texts)

    @pass_context
    def _sum(
        self, context: Context, iterable: Iterable[Any], attribute: str | int | None = None, start: Any = 0
    ) -> Any:
        if attribute is not None:
            iterable = map(make_attrgetter(self, attribute), iterable)
        return functools.reduce(functools.partial(self.call_binop, context, "+"), iterable, start)

    def _strftime_now(self, format: str) -> str:
        bound(256 * len(format))  # as much as Python makes of it
        return self._now().strftime(format)


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> str:
        bound(growth.format_spec(format_spec))
        text: str = cast(Sandbox, self._env).made(super().format_field(value, format_spec))
        return text


class _EscapeFormatter(_Formatter, SandboxedEscapeFormatter):
    pass


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

    def __repr__(self) -> str:
        return "<Namespace>"


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


def _named(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without what compiled templates hand along."""
    return {name: value for name, value in kwargs.items() if not name.startswith("_")} if kwargs else kwargs
