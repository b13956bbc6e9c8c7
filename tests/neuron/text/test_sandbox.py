"""The bounds on what a template makes and does, and that what keeps within them renders as ever."""

from __future__ import annotations

import contextlib
import datetime
import gc
import weakref
from typing import Any

import pytest
from jinja2.exceptions import SecurityError, TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from cortex.neuron.text import account, growth, sandbox
from cortex.neuron.text.account import Account
from cortex.neuron.text.sandbox import Sandbox

NOON = datetime.datetime(2026, 3, 1, 12, 0)
ITEMS = [{"n": 1, "t": "a\tb"}, {"n": 2, "t": "c"}]


def render(source: str, **variables: Any) -> str:
    box = Sandbox(lambda: NOON)
    return box.render(box.compile_bounded(source), variables)


def refusal(source: str, **variables: Any) -> str:
    with pytest.raises(SecurityError) as refused:
        render(source, **variables)
    return str(refused.value)


@pytest.fixture
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account, "MAX_TEXT", 10_000)
    monkeypatch.setattr(account, "MAX_STEPS", 10_000)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' | center(9) }}{{ 'a'.center(9, '-') }}{{ 'a'.ljust(4) }}{{ 'a'.rjust(4) }}{{ '7'.zfill(3) }}",
        "{{ items[0].t.expandtabs(4) }}{{ items[0].t.expandtabs(tabsize=2) }}",
        "{{ 'aXbX' | replace('X', 'yy') }}{{ 'aXbX'.replace('X', 'yy', 1) }}{{ 5 | replace(5, 6, count=1) }}",
        "{{ items | join('|', attribute='n') }}{{ [1, 'b', items] | join }}{{ 'ab' | join('-') }}",
        "{{ '-'.join(items | map(attribute='t')) }}{{ '-'.join('abc') }}{{ '-'.join({'k': 1}) }}",
        "{{ items | sum(attribute='n') }}{{ [[1], [2]] | sum(start=[]) }}{{ [] | sum }}{{ [1.5] | sum }}",
        "{{ '%5d|%-4s|%.2f|%%' % (1, 'a', 2.5) }}{{ '%(k)03d' % {'k': 4} }}",
        "{{ '%s and 12345678' | format(1) }}{{ '%d%%9999999d' % 5 }}",
        "{{ '{0}{k:>5}{0!r}'.format('a', k='b') }}{{ '{:{}}'.format('a', 4) }}",
        "{{ '{a}'.format_map({'a': 1}) }}",
        "{{ ('<{}>' | safe).format('&') }}{{ ('a' | safe) + '<' }}{{ '<' | e }}{{ 'a b' | urlencode }}",
        "{{ 'a\\n\\nb' | indent }}{{ 'a\\nb' | indent(2, true) }}{{ 'a\\nb' | indent('> ', blank=true) }}",
        "{{ [1, 2, 3] | batch(2, 0) | list }}{{ [1, 2, 3] | slice(2, 0) | list }}",
        "{{ 'abc' | batch(2) | list }}{{ 'abc' | slice(2) | list }}",
        "{{ ' a ' | trim }}{{ 'xax' | trim('x') }}{{ 5 | trim('5') }}{{ 'xax'.strip('x') }}",
        "{{ 'a--b--c'.split('--') }}{{ 'a b'.split() }}{{ 'a,b,c'.rsplit(',', maxsplit=1) }}",
        "{{ 'a b'.rsplit() }}{{ 'aba'.rfind('a') }}{{ 'a\nb'.splitlines() }}{{ 'aba'.rpartition('b') }}",
        "{{ 'one two three' | wordwrap(5) }}{{ items | pprint }}{{ 'see http://a.com' | urlize }}",
        "{{ 'äß' | upper }}{{ 'abc' | list }}{{ 'ab cd' | title }}{{ 'ab cd' | wordcount }}",
        "{{ 'cab' | sort }}{{ 'aab' | unique | list }}{{ 'ab' | max }}",
        "{{ 2.55 | round(1) }}{{ '12' | int }}{{ 'ff' | int(base=16) }}{{ 2 ** 10 }}{{ 7 - 2 }}{{ -3 * 2 }}",
        "{{ items[1:] }}{{ 'abc'[::-1] }}{{ [1] + [2] }}{{ (1,) * 3 }}{{ 3 * 'ab' }}{{ 'a' ~ 1 ~ none ~ x }}",
        "{{ [items, (x, 1), {'k': items}] }}{{ {'a': 1}.items() | list }}{{ {'a': 1}.keys() - ['a'] }}",
        "{% macro m(a) %}{{ a }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}"
        "{{ m(*[1, 2], k=3) }}{{ m(*'ab') }}{{ m(**{'a': 4}) }}{% call m(1) %}c{% endcall %}",
        "{% set y %}{{ items }}b{% endset %}{{ y }}{% set z | upper %}c{% endset %}{{ z }}"
        "{% filter upper %}d{{ 5 }}{% endfilter %}{% block q %}e{% endblock %}{{ self.q() }}",
        "{% for i in items recursive %}{{ i.n }}{{ loop(items[1:]) if i.n == 1 }}{% endfor %}",
        "{% for i in items %}{{ cycler('a', 'b').next() }}{{ loop.cycle(1, 2) }}{% else %}n{% endfor %}",
    ],
)
def test_what_keeps_within_the_bounds_renders_as_jinja_renders_it(source: str) -> None:
    plain = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    assert render(source, items=ITEMS) == plain.from_string(source).render(items=ITEMS)


@pytest.mark.parametrize("indent", [None, 2, "--"])
def test_json_renders_as_ever(indent: Any) -> None:
    assert render("{{ items | tojson }}", items=ITEMS[1:]) == '[{"n": 2, "t": "c"}]'
    expected = f'{{\n{" " * indent if isinstance(indent, int) else indent or ""}"n": 2\n}}'
    if indent is not None:
        assert render("{{ {'n': 2} | tojson(indent=indent) }}", indent=indent) == expected


# --- before a text is made ------------------------------------------------------------------------

BIG = "{% set big = 'a' * 9000 %}"


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch, tight: None) -> None:
    """Nobody looks at results, so that what is refused has been refused before it was made."""
    monkeypatch.setattr(Account, "made", lambda self, value: None)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "source",
    [
        "{% set x = 'a' | center(10001) %}",
        "{% set x = 'a' | center(width=10001) %}",
        "{% set x = ['a'] | map('center', 10001) | list %}",
        "{% set x = 'a'.center(10001) %}",
        "{% set x = ('a' | safe).center(10001) %}",
        "{% set x = 'a'.ljust(10001) %}",
        "{% set x = 'a'.rjust(10001) %}",
        "{% set x = '1'.zfill(10001) %}",
        "{% set x = ('a' | attr('ljust'))(10001) %}",
        "{% set x = '\t'.expandtabs(10001) %}",
        "{% set x = '\t'.expandtabs(tabsize=10001) %}",
        "{% set x = big.replace('a', 'bbb') %}",
        "{% set x = big | replace('a', 'bbb') %}",
        "{% set x = [big, big] | join %}",
        "{% set x = ['a', 'b', 'c'] | join(big) %}",
        "{% set x = ''.join([big, big]) %}",
        "{% set x = big.join('abc') %}",
        "{% set x = big.join(['a', 'b', 'c']) %}",
        "{% set x = ''.join(big) %}",
        "{% set x = ''.join(['a', 'b'] | map('replace', 'a', big)) ~ ''.join([big, big] | map('trim')) %}",
        "{% set x = '{:>10001}'.format('a') %}",
        "{% set x = '{:{}}'.format('a', 10001) %}",
        "{% set x = ['{:>10001}'] | map(attribute='format') | first %}{% set x = x(1) %}",
        "{% set x = '{a:.10001f}'.format_map({'a': 1.0}) %}",
        "{% set x = '%10001d' % 1 %}",
        "{% set x = '%.10001f' % 1.0 %}",
        "{% set x = '%(k)10001d' % {'k': 1} %}",
        "{% set x = '%(k)s%(k)s' % {'k': big} %}",
        "{% set x = '%10001d' | format(1) %}",
        "{% set x = 'a\nb' | indent(10001) %}",
        "{% set x = 'a\nb\nc' | indent(big) %}",
        "{% set x = [1] | batch(10001, 2) | list %}",
        "{% set x = [1] | slice(10001) | list %}",
        "{% set x = [1, 2] | tojson(indent=10001) %}",
        "{% set x = [1, 2] | tojson(separators=(big, big)) %}",
        "{% set x = {'a': big} | xmlattr %}",
        "{% set x = big | batch(2) | list %}",
        "{% set x = big.split() %}",
        "{% set x = big.split('a') %}",
        "{% set x = big.splitlines() %}",
        "{% macro m() %}{% endmacro %}{% set x = m(*big) %}",
        "{% set x = 'ab' * 5001 %}",
        "{% set x = 5001 * [1] %}",
        "{% set x = big + big %}",
        "{% set x = [big] + [big] %}",
        "{% set x = [[big], [big]] | sum(start=[]) %}",
        "{% set x = big ~ big %}",
        "{% set x = strftime_now(big) %}",
    ],
)
def test_a_text_too_large_is_refused_before_it_is_made(source: str) -> None:
    assert "10000 characters" in refusal(BIG + source)


@pytest.mark.parametrize(
    "source", ["{{ '%*d' % (3, 1) }}", "{{ '%.*f' % (3, 1) }}", "{{ '%((k))3d' % {'(k)': 1} }}"]
)
def test_a_format_of_unknown_width_is_refused(source: str) -> None:
    assert "cannot be measured" in refusal(source)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "filter",
    [
        *["e", "escape", "forceescape", "urlencode"],
        *["list", "sort", "unique", "max", "min", "title", "wordcount", "join", "groupby('x')"],
        *["map('upper')", "select", "selectattr('x')", "reject", "rejectattr('x')"],
    ],
)
def test_a_text_too_large_is_not_taken_apart_or_coded(filter: str) -> None:
    assert "10000 characters" in refusal(f"{BIG}{{% set x = big | {filter} %}}")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "source",
    [
        "{% set x = big | wordwrap(1) %}",
        "{% set x = big | urlize %}",
        "{% set x = [big] | pprint %}",
        "{% set x = 5 | round(-10001) %}",
        "{% set x = big.strip(big) %}",
        "{% set x = big.lstrip(big) %}",
        "{% set x = big.rstrip(big) %}",
        "{% set x = big | trim(big) %}",
        "{% set x = big.rfind(big) %}",
        "{% set x = big.rindex(big) %}",
        "{% set x = big.rsplit(sep=big) %}",
        "{% set x = big.rpartition(big) %}",
    ],
)
def test_what_takes_long_for_its_size_is_refused(source: str) -> None:
    assert "characters" in refusal(BIG + source)


@pytest.mark.parametrize("name", sorted({*growth.METHODS} - {"join"}))
def test_a_method_that_grows_has_its_measure_under_its_own_name(name: str) -> None:
    assert callable(getattr("", name))


@pytest.mark.usefixtures("tight")
def test_nothing_is_computed_while_a_template_compiles() -> None:
    compiled = Sandbox(lambda: NOON).compile("{{ 'a' | center(5000) }}{{ ('b' | upper) ~ 'c' }}", raw=True)
    assert len(compiled) < 3000
    box = Sandbox(lambda: NOON)
    assert box.render(box.compile_bounded("{{ 'a' | center(5000) }}"), {}) == "a".center(5000)
    assert len(box.compile("{{ 'a' | center(5000) }}", raw=True)) < 3000  # after a rendering, too


def test_a_source_too_long_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "MAX_SOURCE", 100)
    with pytest.raises(TemplateSyntaxError, match="longer than 100"):
        render("x" * 101)


# --- what is made ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    "source",
    [
        "{% set x = (big ~ 'ŉ' * 900) | upper ~ ('ŉ' * 6000) | upper %}",
        "{% set x = ('ŉ' * 6000).upper() %}",
        "{% set x %}{{ big }}{{ big }}{% endset %}",
        "{% set x | length %}{{ big }}{{ big }}{% endset %}",
        "{% filter length %}{{ big }}{{ big }}{% endfilter %}",
        "{% macro m() %}{{ big }}{{ big }}{% endmacro %}{% set x = m() %}",
        "{% macro m() %}{% set x = caller() %}{% endmacro %}{% call m() %}{{ big }}{{ big }}{% endcall %}",
        "{% for i in [1] recursive %}{% set x = loop([0]) if i %}{{ big }}{{ big }}{% endfor %}",
        "{% macro m() %}{% set x = self.q() %}{% endmacro %}{% if 0 %}{% block q %}{{ big }}{{ big }}"
        "{% endblock %}{% endif %}{{ m() }}",
        "{% set x = [big, big] %}",
        "{% set x = (big, big) %}",
        "{% set x = {'a': big, 'b': big} %}",
        "{% set x = dict(a=big, b=big) %}",
        "{% set x = {}.fromkeys([1, 2], big) %}",
        "{% set x = cycler(big, big).items %}",
        "{% macro n() %}{{ varargs | length }}{% endmacro %}{{ n(big, big) }}",
        "{% macro n() %}{{ kwargs | length }}{% endmacro %}{{ n(a=big, b=big) }}",
        "{{ big }}{{ big }}",
    ],
)
def test_what_is_made_is_bounded(source: str) -> None:
    assert "10000 characters" in refusal(BIG + source)


NEST = "{% set ns = namespace(x=(1,)) %}{% for i in range(40) %}{% set ns.x = NEW %}{% endfor %}"


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    "new",
    [
        "[ns.x, ns.x]",
        "(ns.x, ns.x)",
        "[ns.x] * 2",
        "[ns.x] + [ns.x]",
        "{'a': ns.x, 'b': ns.x}",
        "{'a': ns.x, 'b': ns.x}.items()",
        "dict(a=ns.x, b=ns.x)",
        "cycler(ns.x, ns.x).items",
        "([1] | batch(3, ns.x) | list)[0]",
        "[{'k': 1, 'v': ns.x}, {'k': 1, 'v': ns.x}] | groupby('k')",
    ],
)
def test_a_list_counts_as_often_as_it_is_held(new: str) -> None:
    assert "10000 characters" in refusal(NEST.replace("NEW", new))


@pytest.mark.usefixtures("tight")
def test_rows_of_a_filter_that_nobody_saw_count_when_they_are_used() -> None:
    rows = "{% for row in [1] | batch(3, ns.x) %}{% set ns.x = row %}{% endfor %}"
    assert "characters" in refusal(NEST.replace("{% set ns.x = NEW %}", rows))


def test_lists_nest_only_so_deep() -> None:
    assert "too deeply" in refusal(NEST.replace("NEW", "(ns.x,)").replace("40", "300"))


@pytest.mark.usefixtures("tight")
def test_names_that_hold_names_print_as_little() -> None:
    assert render(NEST.replace("NEW", "namespace(a=ns.x, b=ns.x)") + "{{ ns.x }}") == "<Namespace>"


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9) %}{% set x = big[i + 1:] %}{% endfor %}",
        "{% for i in range(9) %}{% set x = big.upper() %}{% endfor %}",
        "{% for i in range(9) %}{% set x = big | upper %}{% endfor %}",
        "{% for i in range(9) %}{% set x = big + 'b' %}{% endfor %}",
        "{% for i in range(9) %}{% set x = big ~ 'b' %}{% endfor %}",
        "{% set l = [1] * 4000 %}{% for i in range(9) %}{% set x = l + [1] %}{% endfor %}",
        "{% for i in range(9) %}{% set x = big * 1 %}{% endfor %}",
        "{% set x %}{% for i in range(9) %}{{ [big] }}{% endfor %}{% endset %}",
        "{% set x = [[big], [big], [big], [big], [big]] | join %}",
        "{% set d = {}.fromkeys(range(90)) %}{% for i in range(9) %}{% set x = d.keys() - [] %}{% endfor %}",
        "{% for i in range(9) %}{% set x = '{}'.format(big) %}{% endfor %}",
        "{% set x = '{0}{0}{0}{0}{0}'.format(big) %}",
        "{% for i in range(900) %}{% set x = 'a' ~ 'b' %}{% endfor %}",
    ],
)
def test_all_that_is_made_is_bounded_together(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(account, "MAX_MADE", 40_000)
    assert "in all" in refusal(BIG + source)


@pytest.mark.parametrize(
    "source", ["{{ ('f' * 2000) | int(base=16) }}", "{{ (1).from_bytes([1] * 600, 'big') }}"]
)
def test_no_integer_gets_huge(source: str) -> None:
    assert "huge integers" in refusal(source)


class Counted:
    """Counts how often it has become a text."""

    times = 0

    def __str__(self) -> str:
        self.times += 1
        return "a" * 9000


@pytest.mark.parametrize(
    "source",
    [
        "{% set x %}{% for i in range(7) %}{{ c }}{% endfor %}{% endset %}",
        "{{ [c, c, c, c, c, c, c] | join }}",
        "{{ c ~ c ~ c ~ c ~ c ~ c ~ c }}",
        "{{ '{0}{0}{0}{0}{0}{0}{0}'.format(c) }}",
    ],
)
def test_texts_count_before_they_are_joined(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(account, "MAX_MADE", 40_000)
    counted = Counted()
    assert "in all" in refusal(source, c=counted)
    assert counted.times == 5


def test_what_is_held_twice_is_measured_once() -> None:
    class Shown(Counted):
        __repr__ = Counted.__str__

    counted = Shown()
    source = NEST.replace("(1,)", "c").replace("40", "9").replace("NEW", "{'a': ns.x, 'b': ns.x}.items()")
    render(source, c=counted)
    assert counted.times < 10  # not 2 ** 9


def test_a_list_that_grows_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    measure = Account._measure_items

    def watch(self: Account, value: Any) -> tuple[int, int]:
        measured.extend(value)
        return measure(self, value)

    monkeypatch.setattr(Account, "_measure_items", watch)
    source = "{% set ns = namespace(l=[]) %}{% for i in items * 50 %}{% set ns.l = ns.l + [i] %}{% endfor %}"
    render(source, items=ITEMS)
    assert len(measured) < 500


# --- what is done ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in 'aaaa' %}{% endfor %}",
        "{{ 'aaaa' | map('upper') | list }}",
        "{% macro m() %}{% endmacro %}{{ m() }}{{ m() }}{{ m() }}{{ m() }}",
    ],
)
def test_rounds_calls_and_filters_are_steps(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(account, "MAX_STEPS", 3)
    assert "3 steps" in refusal(source)


@pytest.mark.parametrize(
    "source", ["{% for i in [1] %}{% endfor %}", "{{ 'a' | upper }}", "{{ 'a'.upper() }}"]
)
def test_time_is_bounded(monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    monkeypatch.setattr(account, "MAX_SECONDS", -1.0)
    assert "seconds" in refusal(source)


@pytest.mark.parametrize(
    "source", ["{{ 'a'.encode() }}", "{{ (5).to_bytes(9, 'big') }}", "{{ 'a'.translate({97: 'b'}) }}"]
)
def test_what_cannot_be_measured_is_closed(source: str) -> None:
    assert "unsafe" in refusal(source)
    assert render("{% set ns = namespace(mapping=1) %}{{ ns.mapping }}{{ {'encode': 2}.encode }}") == "12"


def test_a_template_cannot_turn_escaping_on() -> None:
    with pytest.raises(TemplateSyntaxError, match="no HTML"):
        render("{% autoescape true %}{% endautoescape %}")


def test_a_refused_rendering_leaves_nothing_behind() -> None:
    class Held:
        pass

    held = Held()
    gone = weakref.ref(held)
    gc.disable()
    try:
        with contextlib.suppress(SecurityError):
            render("{% for i in [1] %}{{ 'a'.ljust(10 ** 9) }}{% endfor %}", held=held)
        del held
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.usefixtures("tight")
@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(9999) %}{{ 'xxxxxxxxxx' }}{% endfor %}",
        "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(40) }}",
        "{{ 'x' * 99999 }}",
        "{{ 99999 * [1] }}",
        "{{ 10 ** 99999 }}",
        "{% set x = '%99999d' % 1 %}",
        "{% set x = '%*d' % (99999, 1) %}",
        "{{ range(10 ** 9) | list }}",
        "{% set ns = namespace(t='ab') %}{% for i in range(40) %}{% set ns.t = ns.t ~ ns.t %}{% endfor %}",
        "{% set ns = namespace(t='ab') %}{% for i in range(40) %}{% set ns.t = ns.t + ns.t %}{% endfor %}",
        "{% set ns = namespace(n=9) %}{% for i in range(40) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
    ],
)
def test_a_template_that_runs_away_is_stopped(source: str) -> None:
    with pytest.raises((SecurityError, OverflowError)):
        render(source)


@pytest.mark.usefixtures("tight")
def test_a_bound_counts_for_each_rendering_anew() -> None:
    box = Sandbox(lambda: NOON)
    counted = box.compile_bounded("{% for i in range(4000) %}x{% endfor %}")
    assert [len(box.render(counted, {})) for _ in range(5)] == [4000] * 5
