"""Which rows of a step look at which keys of the cache, together where they can.

Made once a step from its plan. Knows no model and no cache, only in which rows a cache has what and which
of them a query sees.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final, NamedTuple

import torch
from torch import Tensor

from cortex.neuron.nn.plan import Run, Segment, StepPlan, parts
from cortex.neuron.nn.transfer import to_device

KNOWS_CAUSALITY: Final = ("cpu",)
"""Types of devices whose attention hides later tokens by itself."""
GATHERED: Final = {"cpu": 2**22, "cuda": 2**28}
"""Bytes of keys and values that are brought together at once at most, as a layer copies them: more of them
leave the caches of a CPU, and take longer than one look after the other; so do fewer where freed memory is
not kept for the next layer. Unverified on CUDA, as FILLED is."""
FILLED: Final = {"cpu": 64, "cuda": 2**12}
"""Keys more than its own that a row may be given to be gathered with others: a CPU soon takes longer to copy
them than for one look more, while on CUDA every look costs what thousands of them do."""

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
    """Rows of the step that look at a run of their own, `each` of one sequence, all at once and before they
    look at anything else: a call for each sequence costs more than to bring together what they see.

    The rows are [first, last), or those of `rows`, int64. `keys`, int64 [n * length], are the rows of the
    cache that each of n sequences has, filled up with its last one to `length`, and `mask`, fp32
    [n, 1, each, length], is -inf at what a row does not see, None if there is no such thing.
    """

    first: int
    last: int
    rows: Tensor | None
    keys: Tensor
    length: int
    mask: Tensor | None
    each: int = 1
    fresh: bool = True


class Looks(NamedTuple):
    """`views` together show every row all that it may see. `in_order`: every row has one view, and the views
    come in the order of their rows."""

    views: tuple[View | Gathered, ...]
    in_order: bool


class _Alone(NamedTuple):
    """Consecutive rows, the last tokens of one sequence, that see this run to its end; nobody else does."""

    row: int
    rows: int
    run: Run


class Looking:
    """Finds what the rows of a plan see.

    One token sees whole runs of the cache, itself included; rows that see the same run look together, and of
    the runs in which sequences end, those that are about as long; so do few tokens of a sequence.
    Several tokens see what came before them as runs, and themselves causally. A window of W tokens shows a
    token at position q the keys from q - W + 1 on. So several tokens are taken W at a time: the last of them
    still sees the first, and what came before they see through a mask where the window shows.
    """

    def __init__(self, plan: StepPlan, device: torch.device, window: int | None, row_bytes: int) -> None:
        """`row_bytes` is what a layer's cache has of one token."""
        self._plan = plan
        self._device = device
        self._window = window
        self._fresh = [True] * len(plan.ids)
        self._single: dict[Run, list[int]] = {}
        self._views: list[View] = []
        self._most = GATHERED.get(device.type, 0) // row_bytes
        """Keys that are gathered at once."""
        self._short = self._most // 2
        self._alone: list[_Alone] = []
        self._masks: dict[tuple[int, int, int], Tensor] = {}

    def looks(self) -> Looks:
        row = 0
        for part in self._plan.segments:
            if part.length == 1:
                seen = part.runs if self._window is None else self._within(part)
                for run in seen:
                    self._single.setdefault(run, []).append(row)
                if seen[-1][1] <= self._short:
                    self._alone.append(_Alone(row, 1, seen[-1]))
            else:
                self._several(part, row)
            row += part.length
        gathered = self._gathered()
        views: tuple[View | Gathered, ...] = (*gathered, *self._together(), *self._views)
        in_order = all(view.fresh and view.rows is None for view in views)
        return Looks(views, in_order and all(a.last == b.first for a, b in itertools.pairwise(views)))

    def _within(self, part: Segment) -> list[Run]:
        return parts(part.runs, self._oldest(part.start), part.end)

    def _oldest(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        return 0 if self._window is None else max(0, position - self._window + 1)

    def _several(self, part: Segment, row: int) -> None:
        if self._window is None and part.length <= FEW and len(part.runs) == 1:
            few = _Alone(row, part.length, part.runs[0])
            if few.run[1] <= self._short:
                self._alone.append(few)
            else:
                self._views.append(self._few(few))
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

    def _few(self, few: _Alone) -> View:
        """A few rows in one run look at it once, each through a mask."""
        row, rows, (start, length) = few
        mask = torch.full((rows, length), float("-inf"), device=self._device).triu_(length - rows + 1)
        return View(row, row + rows, None, start, length, False, True, mask)

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
        """Of runs in which a sequence ends, and nobody else looks, those that are about as long. Few rows
        that are like nobody's get a view.
        """
        alike: dict[int, list[_Alone]] = {}
        for one in self._alone:
            if one.rows > 1 or len(self._single[one.run]) == 1:
                alike.setdefault(one.rows, []).append(one)
        found = []
        for rows, ones in alike.items():
            for some in self._about_as_long(ones):
                if len(some) > 1:
                    found.append(_gather(some, self._device))
                    for one in some:  # whose run nobody has to look at any more
                        if rows == 1:
                            del self._single[one.run]
                        self._fresh[one.row] = False
                elif rows > 1:
                    self._views.append(self._few(some[0]))
        return sorted(found, key=lambda gathered: gathered.first)

    def _about_as_long(self, ones: list[_Alone]) -> Iterator[list[_Alone]]:
        """In groups that are gathered at once, each in the order of its rows."""
        most = FILLED.get(self._device.type, 0)
        group: list[_Alone] = []
        for one in sorted(ones, key=lambda one: one.run[1]):
            length = one.run[1]
            if group and (length > group[0].run[1] + most or (len(group) + 1) * length > self._most):
                yield sorted(group)
                group = []
            group.append(one)
        if group:
            yield sorted(group)

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


def _gather(ones: list[_Alone], device: torch.device) -> Gathered:
    """All with as many rows."""
    each = ones[0].rows
    starts, counts = to_device([one.run for one in ones], device).unsqueeze(-1).unbind(1)
    length = max(one.run[1] for one in ones)
    places = torch.arange(length, device=device)
    keys = (starts + torch.minimum(places, counts - 1)).view(-1)
    mask = None
    if each > 1 or any(one.run[1] < length for one in ones):
        # Row i of `each` sees all but the last each - 1 - i of its sequence.
        seen = counts.unsqueeze(1) - torch.arange(each - 1, -1, -1, device=device).view(1, each, 1)
        mask = torch.zeros(len(ones), each, length, device=device)
        mask = mask.masked_fill_(places >= seen, float("-inf")).unsqueeze(1)
    rows = [row for one in ones for row in range(one.row, one.row + each)]
    return Gathered(rows[0], rows[-1] + 1, _scattered(rows, device), keys, length, mask, each)


def _scattered(rows: list[int], device: torch.device) -> Tensor | None:
    """The rows, where they do not lie together."""
    return None if rows[-1] + 1 - rows[0] == len(rows) else to_device(rows, device)
