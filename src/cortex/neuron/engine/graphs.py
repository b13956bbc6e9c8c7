"""Decode steps as CUDA graphs, captured once for each bucket of batch sizes when it is first needed.

Opt-in (`options = {"cuda_graphs": true}`, which implies pages) and unverified on hardware. A batch is padded
to its bucket with rows that write to a page nobody reads. Knows steps, not the model that computes them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cortex.neuron.nn.looks import Looks
from cortex.neuron.nn.plan import StepPlan
from cortex.neuron.nn.step import Access, Pages, Step
from cortex.neuron.nn.transfer import to_device


class Replay(Protocol):
    """What was captured; calling it computes again from the same tensors into the same tensors."""

    def __call__(self) -> None: ...


Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]
"""Runs a computation while it is captured; returns how to repeat it, and its result."""


class _Captured(NamedTuple):
    step: Step
    replay: Replay
    logits: Tensor


class DecodeGraphs:
    """`compute` is the model. `pages` is the width of every page table, `spare` a row of the cache that
    belongs to nobody.
    """

    def __init__(
        self,
        compute: Callable[[Step], Tensor],
        *,
        pages: int,
        page: int,
        spare: int,
        device: torch.device,
        capture: Capture | None = None,
    ) -> None:
        self._compute = compute
        self._pages = pages
        self._page = page
        self._spare = spare
        self._device = device
        self._capture = capture or capture_on_cuda
        self._captured: dict[int, _Captured] = {}

    @property
    def buckets(self) -> list[int]:
        """Those captured so far."""
        return sorted(self._captured)

    def logits(self, plan: StepPlan, ids: Tensor | None = None) -> Tensor | None:
        """fp32 [wanted, vocab] of a step that only decodes; None for any other, which is not for a graph.
        `ids`, int64 [T] on the device, are there instead of those of a plan that follows.

        The result is overwritten by the next call.
        """
        rows = len(plan.ids)
        if not rows or len(plan.wanted) != rows or any(part.length != 1 for part in plan.segments):
            return None
        bucket = 1 << (rows - 1).bit_length()
        known = self._captured.get(bucket)
        step = known.step if known else self._blank(bucket)
        self._fill(step, plan, ids)
        if known is None:
            replay, logits = self._capture(lambda: self._compute(step))
            known = self._captured[bucket] = _Captured(step, replay, logits)
        known.replay()
        return known.logits.narrow(0, 0, rows)

    def _blank(self, bucket: int) -> Step:
        """A step of padding only, whose tensors stay where they are."""

        def full(*shape: int, value: int = 0, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=self._device)

        ends = torch.arange(bucket + 1, dtype=torch.int32, device=self._device)
        pages = Pages(
            query_ends=ends,
            key_ends=ends.clone(),
            key_counts=full(bucket, value=1, dtype=torch.int32),
            table=full(bucket, self._pages, value=self._spare // self._page, dtype=torch.int32),
            most_queries=1,
            most_keys=self._pages * self._page,
        )
        slots = full(bucket, value=self._spare)
        access = Access(slots, None, Looks((), True))
        return Step(full(bucket), full(bucket), None, access, pages=pages)

    def _fill(self, step: Step, plan: StepPlan, ids: Tensor | None) -> None:
        """Copy a plan into a step's tensors; the rows behind it become padding again."""
        pages = step.pages
        assert pages is not None
        bucket, rows = step.ids.shape[0], len(plan.ids)
        padding = bucket - rows
        counts = [part.end for part in plan.segments] + [1] * padding
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + count)
        spare = self._spare // self._page
        table = [part.pages(self._page) for part in plan.segments] + [[spare]] * padding
        _set(step.ids, plan.ids + [0] * padding)
        if ids is not None:
            step.ids.narrow(0, 0, rows).copy_(ids)
        _set(step.positions, plan.positions + [0] * padding)
        _set(step.full.slots, [part.last_row for part in plan.segments] + [self._spare] * padding)
        _set(pages.key_counts, counts)
        _set(pages.key_ends, ends)
        _set(pages.table, [row + [spare] * (self._pages - len(row)) for row in table])


def _set(target: Tensor, values: list[int] | list[list[int]]) -> None:
    target.copy_(to_device(values, target.device, target.dtype))


def capture_on_cuda(compute: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
    """Warm up on a side stream, as capture wants it, then capture."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        compute()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = compute()
    return graph.replay, logits
