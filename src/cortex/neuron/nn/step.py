"""A step plan as tensors: the metadata that every layer takes as an argument of `forward`.

Made once a step by the runner. Knows no model and no cache, only in which rows a cache has what and which
of them a query sees.
"""

from __future__ import annotations

import itertools
from typing import Final, NamedTuple

import msgspec
import torch
from torch import Tensor

from cortex.neuron.nn.plan import NO_SLOT, NearSlots, Run, Segment, StepPlan, parts
from cortex.neuron.nn.transfer import to_device

KNOWS_CAUSALITY: Final = ("cpu",)
"""Types of devices whose attention hides later tokens by itself."""
GATHERED: Final = {"cpu": 160, "cuda": 2**12}
"""Keys that a row may see at most for them to be gathered with those of others: a CPU soon takes longer to
copy them, while on CUDA every call costs what thousands of them do. The latter is unverified on hardware."""
MOST_GATHERED: Final = {"cpu": 2**11, "cuda": 2**15}
"""Keys that are gathered at once at most, as a layer copies them: more of them leave the caches of a CPU."""

FEW: Final = 8
"""Several tokens, up to this, look once through a mask at a run that holds all of their sequence: to look at
what came before and at themselves and to merge both costs more then."""


class View(NamedTuple):
    """Some rows of the step look at some keys and values, all of them at all, or causally at their own.

    The rows are [first, last), or those of `rows`, int64, where they do not lie together. The keys are
    `length` rows of the cache from `start` on; with `causal`, they are the step's own rows [first, last).
    `fresh` rows have looked at nothing before; what others see is merged with what they saw. `mask`, fp32
    [rows, length], is added to the scores: -inf at keys that a row's window has left behind and, where
    attention knows no causality by itself, at its own that come later.
    """

    first: int
    last: int
    rows: Tensor | None
    start: int
    length: int
    causal: bool
    fresh: bool
    mask: Tensor | None = None


class Gathered(NamedTuple):
    """Rows of the step of which each looks at a run of its own and at nothing else, all at once: a call for
    each costs more than to bring together what they see.

    The rows are [first, last), or those of `rows`, int64. `keys`, int64 [rows * length], are the rows of the
    cache that each sees, filled up with its last one to `length`, and `mask`, fp32 [rows, 1, 1, length], is
    -inf at those, None if there are none.
    """

    first: int
    last: int
    rows: Tensor | None
    keys: Tensor
    length: int
    mask: Tensor | None
    fresh: bool = True


class Looks(NamedTuple):
    """`views` together show every row all that it may see. `in_order`: every row has one view, and the views
    come in the order of their rows."""

    views: tuple[View | Gathered, ...]
    in_order: bool


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


class Step(NamedTuple):
    """ids and positions: int64 [T]. `wanted`: int64 rows whose logits are asked for, None for all. `full` is
    for layers that attend to everything, `near` for those with a window, None where that is the same;
    `pages` says what both look at where the cache has pages. `states` is for layers with states."""

    ids: Tensor
    positions: Tensor
    wanted: Tensor | None
    full: Access
    near: Access | None = None
    pages: Pages | None = None
    states: States | None = None


def prepare(
    plan: StepPlan,
    device: torch.device,
    page: int | None = None,
    window: int | None = None,
    near: NearSlots | None = None,
    *,
    states: bool = True,
    ids: Tensor | None = None,
) -> Step:
    """`page` is the size of the cache's pages, if it has any; `window` that of layers which have one, and
    `near` says where they have their rows, if not where others have theirs. `states`: there are layers that
    have some, in the segments' slots. `ids`, int64 [T], are there instead of those of a plan that follows."""
    everything = len(plan.wanted) == len(plan.ids)
    full = _paged_access(plan, device) if page else _access(plan, device, None)
    return Step(
        to_device(plan.ids, device) if ids is None else ids,
        to_device(plan.positions, device),
        None if everything else to_device(plan.wanted, device, torch.int64),
        full,
        None if window is None or page else _near(plan, device, window, near, full),
        _pages(plan, page, device) if page else None,
        _states(plan, device) if states else None,
    )


def _near(
    plan: StepPlan, device: torch.device, window: int, near: NearSlots | None, full: Access
) -> Access | None:
    """What layers with a window do, if that is not what others do."""
    if near is None:
        if all(part.end <= window for part in plan.segments):
            return None
        return full._replace(looks=_Looking(plan, device, window).looks())
    segments = [
        msgspec.structs.replace(part, runs=[(near.origin(part.slot, part.start), part.end)])
        for part in plan.segments
    ]
    return _access(msgspec.structs.replace(plan, segments=segments), device, window)


def _access(plan: StepPlan, device: torch.device, window: int | None) -> Access:
    slots = _slots(plan)
    follow = slots == [*range(slots[0], slots[0] + len(slots))]
    looks = _Looking(plan, device, window).looks()
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


class _Looking:
    """Finds what the rows of a plan see.

    One token sees whole runs of the cache, itself included; rows that see the same run look together, and of
    those that see one short run each, all that see about as much.
    Several tokens see what came before them as runs, and themselves causally. A window of W tokens shows a
    token at position q the keys from q - W + 1 on. So several tokens are taken W at a time: the last of them
    still sees the first, and what came before they see through a mask where the window shows.
    """

    def __init__(self, plan: StepPlan, device: torch.device, window: int | None) -> None:
        self._plan = plan
        self._device = device
        self._window = window
        self._fresh = [True] * len(plan.ids)
        self._single: dict[Run, list[int]] = {}
        self._views: list[View] = []
        self._short = GATHERED.get(device.type, 0)
        self._alone: dict[int, Run] = {}
        """Rows that see one short run only."""
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def looks(self) -> Looks:
        row = 0
        for part in self._plan.segments:
            if part.length == 1:
                seen = part.runs if self._window is None else self._within(part)
                for run in seen:
                    self._single.setdefault(run, []).append(row)
                if len(seen) == 1 and seen[0][1] <= self._short:
                    self._alone[row] = seen[0]
            else:
                self._several(part, row)
            row += part.length
        views: tuple[View | Gathered, ...] = (*self._gathered(), *self._together(), *self._views)
        in_order = all(view.fresh and view.rows is None for view in views)
        return Looks(views, in_order and all(a.last == b.first for a, b in itertools.pairwise(views)))

    def _within(self, part: Segment) -> list[Run]:
        return parts(part.runs, self._oldest(part.start), part.end)

    def _oldest(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _several(self, part: Segment, row: int) -> None:
        if self._window is None and part.length <= FEW and len(part.runs) == 1:
            self._views.append(self._few(part, row))
            return
        most = part.length if self._window is None else self._window
        for start in range(part.start, part.end, most):
            end = min(part.end, start + most)
            first = row + start - part.start
            last = first + end - start
            hidden = self._later(end - start)
            self._views.append(View(first, last, None, 0, end - start, True, True, hidden))
            position = self._oldest(start)
            for begin, count in parts(part.runs, position, start):
                self._before(first, last, start, (begin, count), position)
                position += count

    def _few(self, part: Segment, row: int) -> View:
        """A few rows in one run look at it once, each through a mask."""
        start, length = part.runs[0]
        mask = torch.full((part.length, length), float("-inf"), device=self._device).triu_(part.start + 1)
        return View(row, row + part.length, None, start, length, False, True, mask)

    def _before(self, first: int, last: int, start: int, run: Run, position: int) -> None:
        """Rows [first, last), from position `start` on, see a run whose first token is at `position`."""
        begin, count = run
        if self._window is not None:
            last = min(last, first + position + count - start + self._window - 1)  # later ones see none of it
        hidden = self._oldest(start + last - first - 1) - position
        mask = self._mask(last - first, count, position - start) if hidden > 0 else None
        self._views.append(View(first, last, None, begin, count, False, False, mask))

    def _later(self, rows: int) -> Tensor | None:
        """What hides from each of several tokens those that come after it, where that has to be said."""
        if self._device.type in KNOWS_CAUSALITY:
            return None
        known = self._masks.get((rows, rows, 0))
        if known is None:
            full = torch.full((rows, rows), float("-inf"), device=self._device)
            known = self._masks[rows, rows, 0] = full.triu(1)
        return known

    def _mask(self, rows: int, count: int, ahead: int) -> Tensor:
        """For `count` keys of which the first is at the position of the first row plus `ahead`, below 0."""
        assert self._window is not None
        known = self._masks.get((rows, count, ahead))
        if known is None:
            full = torch.full((rows, count), float("-inf"), device=self._device)
            # Row i sees key j where ahead + j > i - window.
            known = self._masks[rows, count, ahead] = full.tril(-ahead - self._window)
        return known

    def _gathered(self) -> list[Gathered]:
        """Of rows that nobody shares a run with, those that see about as much: none is filled up to more than
        twice its length.
        """
        alike: dict[int, list[int]] = {}
        for row, run in self._alone.items():
            if len(self._single[run]) == 1:
                alike.setdefault((run[1] - 1).bit_length(), []).append(row)
        found = []
        for bits, rows in alike.items():
            most = max(1, MOST_GATHERED[self._device.type] >> bits)
            for at in range(0, len(rows), most):
                some = rows[at : at + most]
                if len(some) > 1:
                    runs = [self._alone[row] for row in some]
                    found.append(_gather(some, runs, self._device))
                    for run in runs:  # which nobody has to look at any more
                        del self._single[run]
        return found

    def _together(self) -> list[View]:
        together: list[View] = []
        for (start, count), rows in self._single.items():
            for first_look in (True, False):
                alike = [row for row in rows if self._fresh[row] is first_look]
                if alike:
                    together.append(_view(alike, start, count, first_look, self._device))
            for row in rows:
                self._fresh[row] = False
        return together


def _view(rows: list[int], start: int, count: int, fresh: bool, device: torch.device) -> View:
    return View(rows[0], rows[-1] + 1, _scattered(rows, device), start, count, False, fresh)


def _gather(rows: list[int], runs: list[Run], device: torch.device) -> Gathered:
    starts, counts = to_device(runs, device).unsqueeze(-1).unbind(1)
    length = max(count for _, count in runs)
    places = torch.arange(length, device=device)
    keys = (starts + torch.minimum(places, counts - 1)).view(-1)
    mask = None
    if any(count < length for _, count in runs):
        mask = torch.zeros(len(rows), length, device=device)
        mask = mask.masked_fill_(places >= counts, float("-inf")).view(len(rows), 1, 1, length)
    return Gathered(rows[0], rows[-1] + 1, _scattered(rows, device), keys, length, mask)


def _scattered(rows: list[int], device: torch.device) -> Tensor | None:
    """The rows, where they do not lie together."""
    return None if rows[-1] + 1 - rows[0] == len(rows) else to_device(rows, device)
