"""Figures to words: the table, the ratios with their targets, and the same as JSON.

The targets of `make bench` live here. Pure: nothing is measured and nothing printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Final

from .gateways import OURS, PYTHON, RUST, Gateway
from .measure import DIRECT, LOADS, Subject, middle

_MEMORY_LIMIT: Final = 80e6
_RATIOS: Final = (
    ("plain", RUST, 5.0),
    ("burst", RUST, 3.0),
    ("paced", RUST, 8.0),
    ("flood", PYTHON, 1 / 15),
    ("burst flood", PYTHON, 1 / 15),
    ("paced", PYTHON, 1 / 15),
)
"""The slow peer cannot carry the common load, so where it can be it is compared with both at full speed."""
_ANSWER: Final = {
    "plain": "plain request",
    "burst": "burst reply",
    "paced": "paced reply",
    "single": "plain request, 1 connection",
    "flood": "plain request, in a flood",
    "burst flood": "burst reply, in a flood",
}
_COLUMN: Final = 20


@dataclass(frozen=True)
class Target:
    """One promise and how it went. `met` is None where there is nothing to compare with."""

    text: str
    found: str
    met: bool | None

    def __str__(self) -> str:
        verdict = "not comparable" if self.met is None else "met" if self.met else "MISSED"
        return f"{self.text:<62}{self.found:>12}   {verdict}"


def targets(subjects: Mapping[str, Subject]) -> list[Target]:
    """Every target with its verdict; those of a gateway that is not there are not comparable."""
    ours = subjects.get(OURS.name)
    found = [_ratio(subjects, peer, load, limit) for load, peer, limit in _RATIOS]
    memory = ours.memory if ours and not ours.missing else 0
    text = f"memory: at most {_MEMORY_LIMIT / 1e6:.0f} MB"
    held = memory <= _MEMORY_LIMIT if memory else None
    found.append(Target(text, f"{memory / 1e6:.0f} MB" if memory else "-", held))
    if ours and not ours.missing:
        faults = sum(len(figures.faults) for figures in ours.figures.values())
        found.append(Target("every answer whole", f"{faults} faults", faults == 0))
    return found


def table(subjects: Mapping[str, Subject]) -> str:
    """One column a gateway, one row a figure; the upstream itself in the last column."""
    columns = [*(each for name, each in subjects.items() if name != DIRECT), subjects[DIRECT]]
    direct = subjects[DIRECT]
    rows = [("", [each.title for each in columns])]
    for load in _ANSWER:
        cells = [_cell(each, _cpu(each, load)) for each in columns]
        rows.append((f"CPU µs a {_ANSWER[load]}", cells))
    for title, load, p50, p99 in (
        ("added ms p50 / p99, plain, 1 connection", "single", "p50", "p99"),
        ("added ms p50 / p99, plain, 8 connections", "plain", "p50", "p99"),
        ("added ms p50 / p99, paced, first event", "paced", "first_p50", "first_p99"),
        ("added ms p50 / p99, paced, whole reply", "paced", "p50", "p99"),
    ):
        cells = [_cell(each, _added(each, direct, load, p50, p99)) for each in columns]
        rows.append((title, cells))
    rows.append(("memory MB", [_cell(each, f"{each.memory / 1e6:.0f}") for each in columns]))
    rows.append(("answers checked", [_cell(each, str(_answers(each))) for each in columns]))
    lines = [f"{title:<42}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells) for title, cells in rows]
    return "\n".join([*lines, *_remarks(columns)])


def as_json(subjects: Mapping[str, Subject], verdicts: list[Target]) -> dict[str, object]:
    """All medians and verdicts. Times in microseconds of CPU and milliseconds of latency."""
    found = {}
    for subject in subjects.values():
        loads = {}
        for load in LOADS:
            figures = subject.figures[load.name]
            loads[load.name] = {
                "connections": load.connections,
                "answers": figures.answers,
                "faults": len(figures.faults),
                "cpu_us": _scaled(figures.cpu, 1e6),
                "cpu_us_rounds": [round(value * 1e6, 1) for value in figures.cpu],
                "latency_ms": _pair(figures.p50, figures.p99),
                "first_event_ms": _pair(figures.first_p50, figures.first_p99),
            }
        found[subject.name] = {
            "title": subject.title,
            "missing": subject.missing or None,
            "memory_mb": round(subject.memory / 1e6, 1),
            "loads": loads,
        }
    return {"gateways": found, "targets": [asdict(verdict) for verdict in verdicts]}


def _ratio(subjects: Mapping[str, Subject], peer: Gateway, load: str, limit: float) -> Target:
    bound = f"{limit:.0f}x" if limit >= 1 else f"1/{1 / limit:.0f}"
    text = f"CPU of a {_ANSWER[load]}: at most {bound} of {peer.title}"
    ours, theirs = (_cost(subjects.get(name), load) for name in (OURS.name, peer.name))
    if not ours or not theirs:
        return Target(text, "-", None)
    ratio = ours / theirs
    return Target(text, f"{ratio:.2f}x" if limit >= 1 else f"1/{1 / ratio:.1f}", ratio <= limit)


def _cost(subject: Subject | None, load: str) -> float | None:
    return middle(subject.figures[load].cpu) if subject and not subject.missing else None


def _cell(subject: Subject, figure: str) -> str:
    return "missing" if subject.missing else figure


def _cpu(subject: Subject, load: str) -> str:
    value = middle(subject.figures[load].cpu)
    return "-" if value is None else f"{value * 1e6:,.0f}"


def _added(subject: Subject, direct: Subject, load: str, p50: str, p99: str) -> str:
    """Milliseconds more than the upstream takes; of the upstream itself, what it takes, in brackets."""
    cells = []
    for name in (p50, p99):
        value, base = (middle(getattr(each.figures[load], name)) for each in (subject, direct))
        if value is None or base is None:
            return "-"
        cells.append(f"{(value if subject is direct else value - base) * 1e3:.2f}")
    return f"({' / '.join(cells)})" if subject is direct else " / ".join(cells)


def _answers(subject: Subject) -> int:
    return sum(figures.answers for figures in subject.figures.values())


def _remarks(subjects: list[Subject]) -> list[str]:
    """What a reader must know of gateways that are missing or answered badly."""
    remarks = [f"{each.title}: {each.missing}" for each in subjects if each.missing]
    for subject in subjects:
        for load, figures in subject.figures.items():
            if figures.faults:
                faults = f"{len(figures.faults)} faults in {load}, the first: {figures.faults[0]}"
                remarks.append(f"{subject.title}: {faults}")
    return remarks


def _pair(p50: list[float], p99: list[float]) -> dict[str, float | None]:
    return {"p50": _scaled(p50, 1e3), "p99": _scaled(p99, 1e3)}


def _scaled(values: list[float], factor: float) -> float | None:
    value = middle(values)
    return None if value is None else round(value * factor, 3)
