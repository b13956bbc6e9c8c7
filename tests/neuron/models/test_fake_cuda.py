"""The forward pass on a CUDA device that is not there: shapes, dtypes and devices, no numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cortex.neuron.engine.cache import RunCache
from cortex.neuron.engine.runner import Runner
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.plan import Copy, Segment, StepPlan

DEVICE = torch.device("cuda", 0)
DECODE = [Segment(9, 1, [(0, 10)]), Segment(3, 1, [(20, 3), (30, 1)])]
PLANS = {
    "prefill": StepPlan([1] * 21, [Segment(0, 21, [(0, 21)])], [20]),
    "prefill-after-a-past": StepPlan([1] * 21, [Segment(4, 21, [(0, 4), (10, 6), (20, 15)])], [20]),
    "prefill-that-wants-nothing": StepPlan([1] * 4, [Segment(0, 4, [(0, 4)])], []),
    "decode": StepPlan([1], [Segment(9, 1, [(0, 10)])], [0]),
    "decode-in-order": StepPlan([1, 2], [Segment(9, 1, [(0, 10)]), Segment(3, 1, [(20, 4)])], [0, 1]),
    "decode-in-several-runs": StepPlan([1, 2], DECODE, [0, 1]),
    "decode-with-a-shared-run": StepPlan(
        [1, 2, 3, 4],
        [
            *(Segment(9, 1, [(0, 9), (20 + row, 1)]) for row in range(2)),
            DECODE[1],
            Segment(9, 1, [(0, 9), (40, 1)]),
        ],
        [0, 1, 2, 3],
    ),
    "mixed": StepPlan([1] * 23, [*DECODE, Segment(4, 21, [(40, 4), (50, 21)])], [0, 1, 22]),
    "copies": StepPlan(
        [1], [Segment(9, 1, [(20, 10)])], [0], [Copy(0, 20, 4), Copy(4, 24, 4), Copy(10, 40, 2)]
    ),
}


@pytest.fixture(scope="module", params=["float32", "packed16", "int8", "int4"])
def runner(
    request: pytest.FixtureRequest, fake_model: Callable[[str], Any], cuda_shape: ModelShape
) -> Runner:
    model = fake_model(request.param)
    near = [index for index in range(cuda_shape.layers) if cuda_shape.kind(index) == "sliding"]
    cache = RunCache(cuda_shape.layers, 80, cuda_shape.kv_heads, cuda_shape.head_dim, DEVICE, near=near)
    return Runner(model, cuda_shape, cache, Placement(DEVICE, request.param), 0)


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
def test_every_step_stays_on_the_device(runner: Runner, plan: str) -> None:
    # Without inference mode, in which torch.tensor makes real tensors whatever mode there is.
    logits = inspect.unwrap(Runner.logits)(runner, PLANS[plan])
    shape = (len(PLANS[plan].wanted), runner.shape.vocab)
    assert (logits.shape, logits.dtype, logits.device) == (shape, torch.float32, DEVICE)


@pytest.mark.parametrize(
    ("dtype", "table"), [("float32", torch.float32), ("packed16", torch.float16), ("int4", torch.float16)]
)
def test_on_cuda_nothing_is_packed(dtype: Dtype, table: torch.dtype) -> None:
    placement = Placement(DEVICE, dtype)
    assert not placement.packed
    assert placement.table == table
