"""What is opt-in on CUDA, on a device that is not there: pages and torch's paged attention, decode graphs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.neuron.engine.graphs import DecodeGraphs
from cortex.neuron.engine.paged import PAGE, PagedCache
from cortex.neuron.engine.runner import Runner
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.plan import Copy, Segment, StepPlan

DEVICE = torch.device("cuda", 0)
PAGES = 6
LONG = [(2 * PAGE, PAGE), (0, 5)]
"""A sequence of 261 tokens in two pages that are not neighbours."""
PLANS = {
    "prefill": StepPlan([1] * 21, [Segment(0, 21, [(0, 21)])], [20]),
    "prefill-after-a-past": StepPlan([1] * 5, [Segment(PAGE, 5, LONG)], [4]),
    "decode": StepPlan([1, 2], [Segment(260, 1, LONG), Segment(3, 1, [(PAGE, 4)])], [0, 1]),
    "mixed": StepPlan([1] * 22, [Segment(260, 1, LONG), Segment(0, 21, [(PAGE, 21)])], [0, 21]),
    "chunk": StepPlan([], [], [], chunk=StepPlan([1] * 5, [Segment(PAGE, 5, LONG)], [4]), layers=1),
    "chunk-at-once": StepPlan([], [], [], chunk=StepPlan([1] * 5, [Segment(PAGE, 5, LONG)], [4]), layers=9),
    "follows": StepPlan([0], [Segment(3, 1, [(PAGE, 4)])], [0], follows=[1]),
    "copies": StepPlan([1], [Segment(9, 1, [(PAGE, 10)])], [0], [Copy(0, PAGE, 9)]),
}


@pytest.fixture
def cache(fake_model: Callable[[str], Any], cuda_shape: ModelShape) -> PagedCache:
    return PagedCache(
        cuda_shape.layers,
        PAGES * PAGE,
        cuda_shape.kv_heads,
        cuda_shape.head_dim,
        DEVICE,
        near=[index for index in range(cuda_shape.layers) if cuda_shape.kind(index) == "sliding"],
        window=cuda_shape.window,
    )


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_every_step_over_pages_stays_on_the_device(
    fake_model: Callable[[str], Any], cuda_shape: ModelShape, cache: PagedCache, plan: str
) -> None:
    runner = Runner(fake_model("packed16"), cuda_shape, cache, Placement(DEVICE, "packed16"), 0)
    sampled = torch.empty(2, dtype=torch.int64, device=DEVICE)
    logits = inspect.unwrap(Runner.logits)(runner, PLANS[plan], sampled)
    rows = 1 if plan == "chunk-at-once" else len(PLANS[plan].wanted)
    assert (logits.shape, logits.dtype) == ((rows, cuda_shape.vocab), torch.float32)
    assert logits.device == DEVICE


@pytest.mark.slow
def test_a_captured_decode_step_stays_on_the_device(
    fake_model: Callable[[str], Any], cuda_shape: ModelShape, cache: PagedCache
) -> None:
    model = fake_model("packed16")
    graphs = DecodeGraphs(
        lambda step: model(step, cache.layers),
        pages=PAGES - 1,
        page=PAGE,
        spare=(PAGES - 1) * PAGE,
        device=DEVICE,
        capture=run_again,
    )
    logits = graphs.logits(PLANS["decode"])
    assert logits is not None
    assert (logits.shape, logits.device) == ((2, cuda_shape.vocab), DEVICE)
    assert graphs.logits(PLANS["prefill"]) is None
    logits = graphs.logits(PLANS["follows"], torch.empty(1, dtype=torch.int64, device=DEVICE))
    assert logits is not None
    assert (logits.shape, logits.device) == ((1, cuda_shape.vocab), DEVICE)


def run_again(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for a capture: a replay computes into the tensor of the first run."""
    result = compute()

    def replay() -> None:
        result.copy_(compute())

    return replay, result
