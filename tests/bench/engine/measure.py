"""The runs: all engines of a model up at once, asked in turn, measure by measure and round by round.

So a slow minute of the machine meets them all; while one works the others sleep on a pipe. Each round
has prompts of its own, the same for every engine. Knows nothing of targets.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from .adapter import STREAMS
from .models import SMALLEST, Model, Prompts, codec_of
from .subjects import Failed, Subject

PREFILL, PROMPT, REPLY, LOADERS = 512, 100, 64, 4
LOADS: Final = 2
LONG: Final = 6000
_LOADER_REPLY: Final = 48
SLOW: Final = {"mistral.rs": 4}
"""Engines that take minutes for the full measure: all lengths are divided by this, and there is one round."""
OURS: Final = ("ours", "ours-int8")
MEASURES: Final = ("prefill", "decode", "streams", "first_token")
PATIENCE: Final = 1200.0

Order = tuple[str, dict[str, Any]]


@dataclass
class Found:
    """One engine with one model. A measure's list has one entry a round."""

    missing: str = ""
    """Why there are no figures, or no more of them."""
    version: str = ""
    load_seconds: float | None = None
    memory: dict[str, int] = field(default_factory=dict)
    rounds: dict[str, list[dict[str, Any]]] = field(default_factory=lambda: {name: [] for name in MEASURES})
    agents: dict[str, Any] | None = None
    interference: list[dict[str, Any]] = field(default_factory=list)

    def disturbed(self, cores: float) -> int:
        """Measurements during which other programs had more than so many cores."""
        return sum(each["foreign"] > cores for figures in self.rounds.values() for each in figures)

    def value(self, measure: str) -> float | None:
        """The median over rounds; load time in seconds, memory in bytes."""
        if measure == "load":
            return self.load_seconds
        if measure == "memory":
            return self.memory.get("pss")
        values = [figures["value"] for figures in self.rounds[measure]]
        return statistics.median(values) if values else None


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    rounds: int = 3
    turns: int = 12
    agents: int = 8
    system: int = 1500
    long: int = LONG


QUICK: Final = Extent(rounds=1, turns=3, long=1500)


async def compare(
    model: Model, path: Path, names: Sequence[str], extent: Extent, parts: Sequence[str]
) -> dict[str, Found]:
    """Measure the named engines on one model. Every process has ended on return, whatever happens."""
    prompts = Prompts(codec_of(path))
    found = {name: Found() for name in names}
    async with contextlib.AsyncExitStack() as ending:
        subjects = {}
        for name in names:
            if "speed" not in parts and (name not in OURS or model is not SMALLEST):
                continue
            _say(f"{model.name}: {name} loads")
            subjects[name] = await Subject.start(name)
            ending.push_async_callback(subjects[name].end)
            async with _kept(found[name]):
                loaded = await subjects[name].ask(
                    "load", PATIENCE, path=str(path), times=LOADS, warm_up=prompts.cut(16)
                )
                found[name].load_seconds, found[name].version = loaded["seconds"], loaded["version"]
        if "speed" in parts:
            await _speed(model, subjects, found, prompts, extent.rounds)
        if model is SMALLEST:
            await _manners(subjects, found, prompts, extent, parts)
    _say("")
    return found


async def _speed(
    model: Model, subjects: dict[str, Subject], found: dict[str, Found], prompts: Prompts, rounds: int
) -> None:
    for number in range(rounds):
        turns = {scale: _orders(prompts, scale) for scale in {1, *SLOW.values()}}
        for index, measure in enumerate(MEASURES):
            for name, subject in subjects.items():
                scale = SLOW.get(name, 1)
                if found[name].missing or (scale > 1 and number > 0):
                    continue
                _say(f"{model.name}: round {number + 1} of {rounds}, {measure}, {name}")
                order, arguments = turns[scale][index]
                async with _kept(found[name]):
                    found[name].rounds[measure].append(await subject.ask(order, PATIENCE, **arguments))
    for name, subject in subjects.items():
        if not found[name].missing:
            found[name].memory = subject.memory()


def _orders(prompts: Prompts, scale: int) -> list[Order]:
    """One of each of MEASURES, in their order, with fresh prompts."""
    prompt, reply, loader = PROMPT // scale, REPLY // scale, _LOADER_REPLY // scale
    return [
        ("prefill", {"prompt": prompts.cut(PREFILL // scale)}),
        ("decode", {"prompt": prompts.cut(prompt), "tokens": reply}),
        ("streams", {"prompts": prompts.cuts(STREAMS, prompt), "tokens": reply}),
        (
            "first_token",
            {"prompts": prompts.cuts(LOADERS, prompt), "tokens": loader, "late": prompts.cut(prompt)},
        ),
    ]


async def _manners(
    subjects: dict[str, Subject],
    found: dict[str, Found],
    prompts: Prompts,
    extent: Extent,
    parts: Sequence[str],
) -> None:
    """What only our own engine is asked. A failure here leaves the other figures standing. Of the agents'
    figures, which are counts, one round says all.
    """
    ours = [name for name in subjects if name in OURS and not found[name].missing]
    for name in ours if "agents" in parts else ():
        _say(f"agents, {name}")
        turns = [prompts.cuts(extent.turns, 60) for _ in range(extent.agents)]
        found[name].agents = await _or_error(
            subjects[name], "agents", system=prompts.cut(extent.system), turns=turns, reply=32
        )
    for number in range(extent.rounds if "interference" in parts else 0):
        turn = {
            "batch": prompts.cuts(STREAMS, PROMPT),
            "tokens": REPLY,
            "alone": prompts.cut(extent.long),
            "beside": prompts.cut(extent.long),
            "decoding": prompts.cuts(LOADERS, PROMPT),
        }
        for name in ours:
            _say(f"round {number + 1} of {extent.rounds}, interference, {name}")
            found[name].interference.append(await _or_error(subjects[name], "interference", **turn))


async def _or_error(subject: Subject, order: str, **arguments: Any) -> dict[str, Any]:
    try:
        return await subject.ask(order, PATIENCE, **arguments)
    except Failed as error:
        return {"error": str(error)}


@contextlib.asynccontextmanager
async def _kept(found: Found) -> AsyncIterator[None]:
    """An engine that fails is missing from here on; the others go on."""
    try:
        yield
    except Failed as error:
        found.missing = str(error)


def _say(text: str) -> None:
    """Progress on a terminal, nothing elsewhere."""
    if sys.stderr.isatty():
        print(f"\r{text:<70}\r", end="", file=sys.stderr, flush=True)
