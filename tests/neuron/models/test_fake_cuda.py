"""The forward pass on a CUDA device that is not there: shapes, dtypes and devices, no numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cortex.neuron.engine.cache import RunCache
from cortex.neuron.engine.runner import Runner
from cortex.neuron.engine.windows import WindowPool
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.plan import Copy, NearSlots, Segment, StateCopy, StepPlan

DEVICE = torch.device("cuda", 0)
DECODE = [Segment(9, 1, [(0, 10)]), Segment(3, 1, [(20, 3), (30, 1)])]
CHUNK = Segment(4, 21, [(40, 4), (50, 21)])
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
    "chunk": StepPlan([], [], [], chunk=StepPlan([1] * 21, [CHUNK], [20]), layers=1),
    "chunk-at-once": StepPlan([], [], [], chunk=StepPlan([1] * 21, [CHUNK], [20]), layers=9),
    "follows": StepPlan([0, 0], DECODE, [0, 1], follows=[2, 0]),
    "copies": StepPlan(
        [1], [Segment(9, 1, [(20, 10)])], [0], [Copy(0, 20, 4), Copy(4, 24, 4), Copy(10, 40, 2)]
    ),
}


SIZES = NearSlots(16, 32)


def in_slots(plan: StepPlan) -> StepPlan:
    """The same for layers that have slots, one a segment."""
    segments = [msgspec.structs.replace(part, slot=slot) for slot, part in enumerate(plan.segments)]
    chunk = in_slots(plan.chunk) if plan.chunk else None
    return msgspec.structs.replace(plan, segments=segments, chunk=chunk)


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
    sampled = torch.empty(3, dtype=torch.int64, device=DEVICE)
    logits = inspect.unwrap(Runner.logits)(runner, PLANS[plan], sampled)
    shape = (1 if plan == "chunk-at-once" else len(PLANS[plan].wanted), runner.shape.vocab)
    assert (logits.shape, logits.dtype, logits.device) == (shape, torch.float32, DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("cuda_shape", ["rich"], indirect=True)
def test_layers_with_slots_stay_on_the_device_too(
    fake_model: Callable[[str], Any], cuda_shape: ModelShape
) -> None:
    sizes = (cuda_shape.kv_heads, cuda_shape.head_dim, DEVICE)
    windows = WindowPool(SIZES, len(cuda_shape.sliding_layers), 4, 0, *sizes)
    full = RunCache(cuda_shape.layers - len(cuda_shape.sliding_layers), 80, *sizes)
    made = Runner(fake_model("float32"), cuda_shape, full, Placement(DEVICE, "float32"), 0, windows=windows)
    another_stretch = StepPlan(
        [1], [Segment(32, 1, [(0, 33)])], [0], states=[StateCopy(2, 0, 32), StateCopy(0, 3, 32)]
    )
    plans = [plan for plan in PLANS.values() if not plan.follows]
    for plan in (*plans, another_stretch):
        logits = inspect.unwrap(Runner.logits)(made, in_slots(plan))
        assert (logits.dtype, logits.device) == (torch.float32, DEVICE)
        assert logits.shape[0] == (1 if plan.layers == 9 else len(plan.wanted))


class Seen(TorchDispatchMode):
    """Keeps the dtypes and shapes of all that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.results: set[tuple[torch.dtype, tuple[int, ...]]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.results.add((result.dtype, tuple(result.shape)))
        return result


@pytest.mark.parametrize("dtype", ["packed16", "int8"])
def test_no_matrix_in_16_bits_is_turned_into_fp32_while_it_is_used(
    dtype: Dtype, fake_model: Callable[[str], Any], cuda_shape: ModelShape
) -> None:
    """The token table among them, to which the head is tied where it is not quantised."""
    model = fake_model(dtype)
    stored = {tuple(p.shape) for p in model.parameters() if p.dtype == torch.float16}
    assert (cuda_shape.vocab, cuda_shape.hidden) in stored
    assert len(stored) > 3 or dtype == "int8"
    cache = RunCache(cuda_shape.layers, 80, cuda_shape.kv_heads, cuda_shape.head_dim, DEVICE, near=[])
    runner = Runner(model, cuda_shape, cache, Placement(DEVICE, dtype), 0)
    with Seen() as seen:
        inspect.unwrap(Runner.logits)(runner, PLANS["decode"])
    assert len(seen.results) > 10
    assert not {shape for kind, shape in seen.results if kind == torch.float32} & stored


@pytest.mark.parametrize("dtype", ["float32", "packed16", "int8", "int4"])
def test_a_model_takes_on_the_device_what_was_foretold(
    dtype: Dtype, fake_model: Callable[[str], Any], cuda_shape: ModelShape
) -> None:
    """A tied head that is quantised is a matrix of its own, beside the table."""
    model = fake_model(dtype)
    assert (model.head is None) == (dtype in ("float32", "packed16"))
    taken = sum(getattr(module, "nbytes", 0) for module in model.modules())
    assert taken == cuda_shape.weight_bytes(dtype, packs=False)


@pytest.mark.parametrize(
    ("dtype", "table"), [("float32", torch.float32), ("packed16", torch.float16), ("int4", torch.float16)]
)
def test_on_cuda_nothing_is_packed(dtype: Dtype, table: torch.dtype) -> None:
    placement = Placement(DEVICE, dtype)
    assert not placement.packed
    assert placement.table == table
