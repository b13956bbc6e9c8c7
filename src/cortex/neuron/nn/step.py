"""A step plan as tensors: the metadata that every layer takes as an argument of `forward`.

Made once a step by the runner. Knows no model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cortex.neuron.nn.plan import StepPlan


class Span(NamedTuple):
    """One segment among the packed rows [first, last).

    `end` is how many tokens of the sequence there are with this segment. `mask` is added to the
    attention scores, fp32 [length, end], 0 or -inf; None where nothing is hidden (one token) or all
    is causal from the first position on (`start` 0).
    """

    slot: int
    start: int
    end: int
    first: int
    last: int
    mask: Tensor | None


class Step(NamedTuple):
    """ids and positions: int64 [T]. `wanted`: int64 rows whose logits are asked for, None for all."""

    ids: Tensor
    positions: Tensor
    spans: tuple[Span, ...]
    wanted: Tensor | None


def prepare(plan: StepPlan, device: torch.device) -> Step:
    spans = []
    first = 0
    for part in plan.segments:
        mask = None
        if part.length > 1 and part.start > 0:
            mask = _causal(part.start, part.length, device)
        spans.append(Span(part.slot, part.start, part.end, first, first + part.length, mask))
        first += part.length
    everything = len(plan.wanted) == len(plan.ids)
    return Step(
        torch.tensor(plan.ids, device=device),
        torch.tensor(plan.positions, device=device),
        tuple(spans),
        None if everything else torch.tensor(plan.wanted, dtype=torch.int64, device=device),
    )


def _causal(start: int, length: int, device: torch.device) -> Tensor:
    hidden = torch.full((length, start + length), float("-inf"), device=device)
    return hidden.triu_(start + 1)
