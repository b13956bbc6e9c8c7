"""The forward pass on a CUDA device that is not there: shapes, dtypes and devices, no numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cortex.neuron.engine.cache import SlotCache
from cortex.neuron.models.llama import build
from cortex.neuron.models.shape import ModelShape, Rope
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.plan import Segment, StepPlan
from cortex.neuron.nn.step import prepare

SHAPE = ModelShape(
    architecture="qwen2",
    layers=2,
    hidden=48,
    heads=6,
    kv_heads=2,
    head_dim=8,
    intermediate=80,
    vocab=199,
    max_position=256,
    rope=Rope(10000.0),
    norm_eps=1e-6,
    tied=True,
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "packed16"])
def test_prefill_and_decode_stay_on_the_device(dtype: Dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    # A build without CUDA has no device guard, which the method asks for and the operator does not.
    copy = torch.ops.aten.copy_.default
    monkeypatch.setattr(torch.Tensor, "copy_", lambda target, source: copy(target, source))
    device = torch.device("cuda", 0)
    model = build(SHAPE, Placement(device, dtype))
    with FakeTensorMode():
        for module in model.modules():
            parameters: Mapping[str, Tensor] = dict(module.named_parameters(recurse=False))
            if parameters:
                host = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in parameters.items()}
                filled: Any = module
                filled.fill(host)
        cache = SlotCache(SHAPE.layers, 2, SHAPE.kv_heads, SHAPE.head_dim, 64, device)
        plan = StepPlan([1] * 22, [Segment(0, 9, 1), Segment(1, 4, 21)], [0, 21])
        logits = model(prepare(plan, device), cache.layers)
        assert (logits.shape, logits.dtype, logits.device) == ((2, 199), torch.float32, device)
    assert all(parameter.device == device for parameter in model.parameters())
