"""A step plan as tensors: the metadata that every layer takes as an argument of `forward`.

Made once a step by the runner. Knows no model and no cache, only in which rows a cache has what.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from cortex.neuron.nn.looks import Looking, Looks
from cortex.neuron.nn.plan import NO_SLOT, NearSlots, StepPlan, parts
from cortex.neuron.nn.transfer import to_device


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


class Access(NamedTuple):
    """What layers do with their cache: each row is stored in one of `slots`, int64 [T], from `first_slot` on
    where these follow each other, and sees what `looks` say."""

    slots: Tensor
    first_slot: int | None
    looks: Looks


class Asked(NamedTuple):
    """The rows whose logits are asked for, int64, and a step of them alone, to look at the cache; None if
    there are none. In the last layer only they go on, once it has stored what later steps need of all."""

    rows: Tensor
    step: Step | None


class Step(NamedTuple):
    """ids and positions: int64 [T]. `asked`: the rows whose logits are asked for, None for all. `full` is
    for layers that attend to everything, `near` for those with a window, None where that is the same;
    `pages` says what both look at where the cache has pages. `states` is for layers with states."""

    ids: Tensor
    positions: Tensor
    asked: Asked | None
    full: Access
    near: Access | None = None
    pages: Pages | None = None
    states: States | None = None


def chosen(x: Tensor, asked: Asked | None) -> Tensor:
    """Those of x's rows that go on in the last layer."""
    return x if asked is None else x.index_select(0, asked.rows)


def prepare(
    plan: StepPlan,
    device: torch.device,
    page: int | None = None,
    window: int | None = None,
    near: NearSlots | None = None,
    *,
    row_bytes: int = 1,
    states: bool = True,
    ids: Tensor | None = None,
) -> Step:
    """`page` is the size of the cache's pages, if it has any; `window` that of layers which have one, and
    `near` says where they have their rows, if not where others have theirs. `states`: there are layers that
    have some, in the segments' slots. `row_bytes` is what a layer's cache has of one token. `ids`, int64 [T],
    are there instead of those of a plan that follows."""
    full = _paged_access(plan, device) if page else _access(plan, device, None, row_bytes)
    return Step(
        to_device(plan.ids, device) if ids is None else ids,
        to_device(plan.positions, device),
        _asked(plan, device, page, window, near, row_bytes),
        full,
        None if window is None or page else _near(plan, device, window, near, full, row_bytes),
        _pages(plan, page, device) if page else None,
        _states(plan, device) if states else None,
    )


def _asked(
    plan: StepPlan,
    device: torch.device,
    page: int | None,
    window: int | None,
    near: NearSlots | None,
    row_bytes: int,
) -> Asked | None:
    if len(plan.wanted) == len(plan.ids):
        return None
    alone = None
    if plan.wanted:
        alone = prepare(plan.asked(), device, page, window, near, row_bytes=row_bytes, states=False)
    return Asked(to_device(plan.wanted, device, torch.int64), alone)


def _near(
    plan: StepPlan, device: torch.device, window: int, near: NearSlots | None, full: Access, row_bytes: int
) -> Access | None:
    """What layers with a window do, if that is not what others do."""
    if near is None:
        if all(part.end <= window for part in plan.segments):
            return None
        return full._replace(looks=Looking(plan, device, window, row_bytes).looks())
    segments = [
        msgspec.structs.replace(part, runs=[(near.origin(part.slot, part.start), part.end)])
        for part in plan.segments
    ]
    return _access(msgspec.structs.replace(plan, segments=segments), device, window, row_bytes)


def _access(plan: StepPlan, device: torch.device, window: int | None, row_bytes: int) -> Access:
    slots = _slots(plan)
    follow = slots == [*range(slots[0], slots[0] + len(slots))]
    looks = Looking(plan, device, window, row_bytes).looks()
    return Access(to_device(slots, device), slots[0] if follow else None, looks)


def _paged_access(plan: StepPlan, device: torch.device) -> Access:
    """Which looks by its pages."""
    return Access(to_device(_slots(plan), device), None, Looks((), True))


def _slots(plan: StepPlan) -> list[int]:
    """Where the tokens of a step are stored."""
    slots: list[int] = []
    for part in plan.segments:
        for first, count in parts(part.runs, part.start, part.end):
            slots += range(first, first + count)
    return slots


def _states(plan: StepPlan, device: torch.device) -> States | None:
    if all(part.slot == NO_SLOT for part in plan.segments):
        return None
    rows: list[int] = []
    slots: list[int] = []
    spans: list[Span] = []
    row = 0
    for part in plan.segments:
        if part.length == 1:
            rows.append(row)
            slots.append(part.slot)
        else:
            spans.append(Span(row, row + part.length, part.slot))
        row += part.length
    in_order = rows == [*range(len(rows))]
    if not rows:
        return States(None, None, in_order, tuple(spans))
    of_rows, of_slots = (to_device(numbers, device) for numbers in (rows, slots))
    return States(of_rows, of_slots, in_order, tuple(spans))


def _pages(plan: StepPlan, page: int, device: torch.device) -> Pages:
    def numbers(values: object) -> Tensor:
        return to_device(values, device, torch.int32)

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
