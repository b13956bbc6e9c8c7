"""Figures to words: a table for each model, ratios, targets with their verdicts, and the same as JSON.

The targets of `make bench-engine` live here. Pure: nothing is measured and nothing printed.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from .measure import OURS, SLOW, Found
from .models import ALL, SMALLEST

Results = Mapping[str, Mapping[str, Found]]
"""Model -> engine -> what was found."""
Quality = Mapping[str, Mapping[str, Any]]
"""Model -> what `quality.compare` told, or its error."""

RATES: Final = ("prefill", "decode", "streams")
ROWS: Final = {
    "prefill": "prefill tok/s, 512 tokens",
    "decode": "decode tok/s, 1 stream",
    "streams": "tok/s of 8 streams, 100 in, 64 out",
    "first_token": "s to 1st token, 4 others decoding",
    "load": "load s, second load",
    "memory": "memory MB (PSS) / RSS",
}
_LESS_IS_BETTER: Final = ("first_token", "load", "memory")
LLAMA, MISTRAL = "llama.cpp", "mistral.rs"
_MUST: Final = {
    ("ours", LLAMA): {"prefill": 1.5, "decode": 0.45, "streams": 1.4},
    ("ours-int8", LLAMA): {"prefill": 2.0, "decode": 0.65, "streams": 1.8},
    ("ours", MISTRAL): dict.fromkeys(RATES, 2.5),
    ("ours-int8", MISTRAL): dict.fromkeys(RATES, 2.5),
}
_GOALS: Final = {("ours-int8", LLAMA): {"decode": 1.0, "streams": 2.5}}
_KL: Final = {"packed16": (1e-4, 0.0), "int8": (0.02, 0.95)}
"""Weight form -> most divergence in nats, least share of equal likeliest tokens; for each model."""
_AGAIN, _GAP, _SHARE = 1.2, 3.0, 0.5
_FOREIGN: Final = 0.1
"""Cores that other programs may have before a measurement counts as disturbed."""
_COLUMN: Final = 20


@dataclass(frozen=True)
class Target:
    """One promise and how it went. `met` is None where there is nothing to compare; a goal may be missed."""

    text: str
    found: str
    met: bool | None
    goal: bool = False

    def __str__(self) -> str:
        verdict = "not comparable" if self.met is None else "met" if self.met else "MISSED"
        verdict = "not reached" if self.goal and self.met is False else verdict
        return f"{self.text:<66}{self.found:>12}   {verdict}"


def ratio(results: Results, model: str, ours: str, peer: str, measure: str) -> float | None:
    """How many times better ours is; None where one of the two is missing."""
    found = results.get(model, {})
    values = [found[name].value(measure) if name in found else None for name in (ours, peer)]
    if not values[0] or not values[1]:
        return None
    return values[1] / values[0] if measure in _LESS_IS_BETTER else values[0] / values[1]


def mean_ratio(results: Results, ours: str, peer: str, measure: str) -> float | None:
    """The geometric mean over the models where both are there."""
    found = [each for model in results if (each := ratio(results, model, ours, peer, measure))]
    return statistics.geometric_mean(found) if found else None


# --- verdicts -------------------------------------------------------------------------------------


def targets(results: Results, quality: Quality, parts: Sequence[str]) -> list[Target]:
    found: list[Target] = []
    if "speed" in parts:
        found += [_speed(results, *pair, measure, limit, False) for pair, measure, limit in _pairs(_MUST)]
        found += [_speed(results, *pair, measure, limit, True) for pair, measure, limit in _pairs(_GOALS)]
    if "quality" in parts:
        for model, told in quality.items():
            found += [_quality(model, told, form) for form in _KL]
    smallest = results.get(SMALLEST.name, {})
    for name in [name for name in OURS if name in smallest]:
        if "agents" in parts:
            found.append(_agents(name, smallest[name].agents))
        if "interference" in parts:
            found += _interference(name, smallest[name].interference)
    return found


def _pairs(limits: Mapping[tuple[str, str], Mapping[str, float]]) -> list[tuple[tuple[str, str], str, float]]:
    return [(pair, measure, limit) for pair, each in limits.items() for measure, limit in each.items()]


def _speed(results: Results, ours: str, peer: str, measure: str, limit: float, goal: bool) -> Target:
    name = {"prefill": "prefill", "decode": "1 stream", "streams": "8 streams"}[measure]
    text = f"{'goal: ' if goal else ''}{ours}, {name}: at least {limit:g}x {peer}"
    found = mean_ratio(results, ours, peer, measure)
    return Target(text, "-" if found is None else f"{found:.2f}x", found and found >= limit, goal)


def _quality(model: str, told: Mapping[str, Any], form: str) -> Target:
    most, least = _KL[form]
    text = f"{model}, {form}: KL at most {most:g}" + (f", {least:.0%} equal top tokens" if least else "")
    figures = told.get("forms", {}).get(form, {})
    if "kl" not in figures:
        return Target(text, "-", None)
    met = figures["kl"] <= most and figures["same_top"] >= least
    return Target(text, f"{figures['kl']:.1e}" + (f" {figures['same_top']:.1%}" if least else ""), met)


def _agents(name: str, figures: Mapping[str, Any] | None) -> Target:
    text = f"{name}, agents: prefill at most {_AGAIN}x the new tokens"
    if not figures or "value" not in figures:
        return Target(text, "-", None)
    return Target(text, f"{figures['value']:.2f}x", figures["value"] <= _AGAIN)


def _interference(name: str, rounds: Sequence[Mapping[str, Any]]) -> list[Target]:
    gap = f"{name}: worst gap beside a long prefill under {_GAP:g}x the usual"
    share = f"{name}: that prefill at {_SHARE:.0%} of its solo rate or more"
    if not rounds or any("value" not in figures for figures in rounds):
        return [Target(gap, "-", None), Target(share, "-", None)]
    # A stream that ended before the prompt was read did not stand beside all of it.
    whole = all(figures["ended_early"] == 0 for figures in rounds)
    worst, rate = (statistics.median(figures[key] for figures in rounds) for key in ("value", "share"))
    return [
        Target(gap, f"{worst:.2f}x", whole and worst < _GAP),
        Target(share, f"{rate:.0%}", whole and rate >= _SHARE),
    ]


# --- tables ---------------------------------------------------------------------------------------


def speed_table(model: str, found: Mapping[str, Found]) -> str:
    """Of one model, a column an engine."""
    title = next(each.title for each in ALL if each.name == model)
    lines = [_line(title, [_title(name, each) for name, each in found.items()])]
    lines += [_line(text, [_cell(each, row) for each in found.values()]) for row, text in ROWS.items()]
    return "\n".join(lines + _cross_checks(found))


def ratio_tables(results: Results) -> str:
    """Of ours to each peer, and what to know of all the figures."""
    lines: list[str] = []
    for ours in OURS:
        for peer in (LLAMA, MISTRAL):
            lines += _ratios(results, ours, peer)
    return "\n".join(lines + _notes(results))


def broken(results: Results, quality: Quality) -> bool:
    """True if something of ours that was to be measured could not be."""
    ours = [each for found in results.values() for name, each in found.items() if name in OURS]
    told = [part for each in ours for part in (each.agents, *each.interference) if part]
    told += [part for each in quality.values() for part in (each, *each.get("forms", {}).values())]
    return any(each.missing for each in ours) or any("error" in part for part in told)


def missing(results: Results) -> str:
    """Which engines failed with which model, and how."""
    return "\n".join(
        f"{name} with {model} is missing: {each.missing}"
        for model, found in results.items()
        for name, each in found.items()
        if each.missing
    )


def _title(name: str, found: Found) -> str:
    return name if name in OURS else f"{name} {found.version[:7].rstrip('.')}"


def _cell(found: Found, row: str) -> str:
    value = found.value(row)
    if value is None:
        return "missing" if found.missing else "-"
    if row == "memory":
        return f"{value / 1e6:,.0f} / {found.memory['rss'] / 1e6:,.0f}"
    return f"{value:.2f}" if row in _LESS_IS_BETTER else f"{value:.1f}"


def _ratios(results: Results, ours: str, peer: str) -> list[str]:
    """Ours to a peer: a column a model, the geometric mean last."""
    rows = []
    for row in ROWS:
        cells = [ratio(results, model, ours, peer, row) for model in results]
        cells.append(mean_ratio(results, ours, peer, row))
        if any(cells):
            rows.append(_line(row, ["-" if cell is None else f"{cell:.2f}x" for cell in cells]))
    if not rows:
        return []
    return [_line(f"{ours}, times better than {peer}", [*results, "geo. mean"]), *rows, ""]


def _cross_checks(found: Mapping[str, Found]) -> list[str]:
    """What an engine itself says of its speed, beside what the clock said."""
    lines = []
    for name, each in found.items():
        said = []
        for row in ("prefill", "decode"):
            own = [figures["own"] for figures in each.rounds[row] if figures.get("own")]
            if own:
                said.append(f"{row} {statistics.median(own):.1f} tok/s")
        if said:
            lines.append(f"({name} says of itself: {', '.join(said)}.)")
        if any(not figures["loaded"] for figures in each.rounds["first_token"]):
            lines.append(f"({name}: the others did not all decode until the first token came.)")
    return lines


def _notes(results: Results) -> list[str]:
    every = [each for found in results.values() for each in found.values()]
    count = sum(len(figures) for each in every for figures in each.rounds.values())
    disturbed = sum(each.disturbed(_FOREIGN) for each in every)
    notes = []
    if disturbed:
        notes.append(
            f"Other programs had more than {_FOREIGN:.0%} of a core in {disturbed} of {count} measurements: "
            "engines whose threads spin while they wait suffer most from that."
        )
    for name, scale in SLOW.items():
        if any(name in found and found[name].value("prefill") for found in results.values()):
            notes.append(
                f"{name} is asked for 1/{scale} of all lengths, in one round: its rates are per token, but "
                f"its time to first token is that of a prompt of {100 // scale} tokens."
            )
    return notes


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:<36}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)


def quality_table(quality: Quality) -> str:
    """Divergence and equal top tokens of each weight form; a row a model, their mean last."""
    lines = []
    for form in _KL:
        rows: list[tuple[float, float]] = []
        for model, told in quality.items():
            figures = told.get("forms", {}).get(form) or told
            if "kl" in figures:
                rows.append((figures["kl"], figures["same_top"]))
                kl = f"KL {figures['kl']:.2e}"
                said = [kl, f"top {figures['same_top']:.2%}", f"{told['positions']} positions"]
            else:
                said = [f"  missing: {figures.get('error', 'not measured')}"]
            lines.append(_line(f"quality of {form}, {model}", said))
        if len(rows) > 1:
            kl, top = (statistics.fmean(column) for column in zip(*rows, strict=True))
            lines.append(_line(f"quality of {form}, mean", [f"KL {kl:.2e}", f"top {top:.2%}"]))
    return "\n".join(lines)


def manners_table(results: Results) -> str:
    """The figures behind the verdicts on agents and interference."""
    lines = []
    for name, found in results.get(SMALLEST.name, {}).items():
        told = found.agents
        if told and "value" in told:
            lines.append(
                f"{name}, agents: {told['prefilled']:,} prompt tokens computed, {told['new']:,} were new, "
                f"{told['sent']:,} were sent"
            )
        for number, told in enumerate(found.interference, 1):
            if "value" in told:
                lines.append(
                    f"{name}, interference {number}: worst gap {told['worst_gap'] * 1e3:.0f} ms, median "
                    f"{told['median_gap'] * 1e3:.0f}, usual of 8 streams {told['usual_gap'] * 1e3:.0f}: "
                    f"{told['value']:.2f}x; prefill {told['rate']:.0f} tok/s, alone {told['solo_rate']:.0f}: "
                    f"{told['share']:.0%}; {told['ended_early']} of the streams ended before it"
                )
            else:
                lines.append(f"{name}, interference {number}: {told['error']}")
        if found.agents and "error" in found.agents:
            lines.append(f"{name}, agents: {found.agents['error']}")
    return "\n".join(lines)


def as_json(results: Results, quality: Quality, verdicts: Sequence[Target]) -> dict[str, Any]:
    """Everything, each round's figures included. Seconds, bytes, tokens a second."""
    return {
        "models": {
            model: {
                name: {**asdict(each), "medians": {row: each.value(row) for row in ROWS}}
                for name, each in found.items()
            }
            for model, found in results.items()
        },
        "quality": quality,
        "targets": [asdict(verdict) for verdict in verdicts],
    }
