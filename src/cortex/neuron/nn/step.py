"""A step plan as tensors: the metadata that every layer takes as an argument of `forward`.

Made once a step by the runner. Knows no model and no cache, only in which rows a cache has what.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from cortex.neuron.nn.plan import StepPlan, parts


class View(NamedTuple):
    """Some rows of the step look at some keys and values, all of them at all, or causally at their own.

    The rows are [first, last), or those of `rows`, int64, where they do not lie together. The keys are
    `length` rows of the cache from `start` on; with `causal`, they are the step's own rows [first, last).
    `fresh` rows have looked at nothing before; what others see is merged with what they saw.
    """

    first: int
    last: int
    rows: Tensor | None
    start: int
    length: int
    causal: bool
    fresh: bool


class Pages(NamedTuple):
    """For a cache in pages, int32: where each sequence's queries and keys end, [S + 1] from 0 on; how many
    keys it has, [S]; its pages, [S, most pages of any]; and the most queries and keys of any."""

    query_ends: Tensor
    key_ends: Tensor
    key_counts: Tensor
    table: Tensor
    most_queries: int
    most_keys: int


class Span(NamedTuple):
    """The rows [first, last) of the step are consecutive tokens of one sequence, more than one; `slot` is
    where its states lie."""

    first: int
    last: int
    slot: int


class States(NamedTuple):
    """For layers that keep a state of fixed size for each sequence. Slots differ from each other.

    `rows`, int64 [n], are those of sequences that have one token in this step, and `slots`, int64 [n], where
    their states lie; both None if there are none. The other rows are those of `spans`.
    """

    rows: Tensor | None
    slots: Tensor | None
    in_order: bool
    """`rows` are 0 to n - 1."""
    spans: tuple[Span, ...]


class Step(NamedTuple):
    """ids and positions: int64 [T]. `slots`: int64 [T], where the cache stores each row; where they follow
    each other, `first_slot` is the first one. `views` together show every row all that it may see. `wanted`:
    int64 rows whose logits are asked for, None for all."""

    ids: Tensor
    positions: Tensor
    slots: Tensor
    views: tuple[View, ...]
    in_order: bool
    """Every row has one view, and the views come in the order of their rows."""
    wanted: Tensor | None
    first_slot: int | None = None
    pages: Pages | None = None
    """Instead of views, for a cache in pages."""
    states: States | None = None
    """For models that have layers with states."""


def prepare(plan: StepPlan, device: torch.device, page: int | None = None) -> Step:
    """`page` is the size of the cache's pages, if it has any."""
    slots: list[int] = []
    for part in plan.segments:
        for first, count in parts(part.runs, part.start, part.end):
            slots += range(first, first + count)
    views = () if page else _views(plan, device)
    everything = len(plan.wanted) == len(plan.ids)
    return Step(
        torch.tensor(plan.ids, device=device),
        torch.tensor(plan.positions, device=device),
        torch.tensor(slots, device=device),
        views,
        all(view.fresh and view.rows is None for view in views)
        and all(a.last == b.first for a, b in itertools.pairwise(views)),
        None if everything else torch.tensor(plan.wanted, dtype=torch.int64, device=device),
        slots[0] if slots == [*range(slots[0], slots[0] + len(slots))] and not page else None,
        _pages(plan, page, device) if page else None,
    )


def _pages(plan: StepPlan, page: int, device: torch.device) -> Pages:
    def numbers(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    queries = [part.length for part in plan.segments]
    keys = [part.end for part in plan.segments]
    tables = [part.pages(page) for part in plan.segments]
    widest = max(map(len, tables))
    return Pages(
        numbers([0, *itertools.accumulate(queries)]),
        numbers([0, *itertools.accumulate(keys)]),
        numbers(keys),
        numbers([table + [0] * (widest - len(table)) for table in tables]),
        max(queries),
        max(keys),
    )


def _views(plan: StepPlan, device: torch.device) -> tuple[View, ...]:
    """One token sees whole runs of the cache, itself included; rows that see the same run look together.
    Several tokens see what came before them as whole runs, and themselves causally.
    """
    seen_by: dict[tuple[int, int], list[int]] = {}
    views: list[View] = []
    fresh = [True] * len(plan.ids)
    row = 0
    for part in plan.segments:
        last = row + part.length
        if part.length == 1:
            for run in part.runs:
                seen_by.setdefault(run, []).append(row)
        else:
            views.append(View(row, last, None, 0, part.length, True, True))
            for first, count in parts(part.runs, 0, part.start):
                views.append(View(row, last, None, first, count, False, False))
        row = last
    together: list[View] = []
    for (start, count), rows in seen_by.items():
        for first_look in (True, False):
            alike = [row for row in rows if fresh[row] is first_look]
            if alike:
                together.append(_view(alike, start, count, first_look, device))
        for row in rows:
            fresh[row] = False
    return (*together, *views)


def _view(rows: list[int], start: int, count: int, fresh: bool, device: torch.device) -> View:
    first, last = rows[0], rows[-1] + 1
    scattered = None if last - first == len(rows) else torch.tensor(rows, device=device)
    return View(first, last, scattered, start, count, False, fresh)
