"""How tests compute what a checkpoint says, and models on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cortex.neuron.engine.runner import load_runner
from cortex.neuron.models.llama import build
from cortex.neuron.models.shape import ModelShape, Rope
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.plan import Run, Segment, StepPlan, parts

CACHE = 400
"""Tokens."""


class Computing:
    """A checkpoint as the engine computes it, fp32 unless another form is asked for."""

    def __init__(self, path: Path, dtype: Dtype = "float32") -> None:
        placement = Placement(torch.device("cpu"), dtype)
        self.runner = load_runner(path, placement, cache_rows=CACHE, report=lambda done, total: None)

    def logits(self, plan: StepPlan) -> Tensor:
        return self.runner.logits(plan)

    def in_chunks(self, ids: list[int], chunks: list[int], runs: list[Run] | None = None) -> Tensor:
        """Logits of every token, computed in chunks of these lengths; `runs` says where if not in a row."""
        found = []
        start = 0
        for length in chunks:
            part = ids[start : start + length]
            segment = Segment(start, length, parts(runs or [(0, CACHE)], 0, start + length))
            found.append(self.logits(StepPlan(part, [segment], list(range(length)))))
            start += length
        assert start == len(ids)
        return torch.cat(found)

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """The likeliest tokens after a prompt, one step each."""
        tokens = [int(self.in_chunks(prompt, [len(prompt)])[-1].argmax())]
        while len(tokens) < count:
            end = len(prompt) + len(tokens)
            plan = StepPlan(tokens[-1:], [Segment(end - 1, 1, [(0, end)])], [0])
            tokens.append(int(self.logits(plan).argmax()))
        return tokens


@pytest.fixture(scope="session")
def computing() -> type[Computing]:
    return Computing


# --- a CUDA device that is not there --------------------------------------------------------------


@pytest.fixture(scope="session")
def cuda_shape() -> ModelShape:
    return ModelShape(
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


@pytest.fixture(scope="module")
def fake_model(cuda_shape: ModelShape) -> Iterator[Callable[[Dtype], Any]]:
    """Makes filled models on it; under the mode that makes all tensors fake."""
    device = torch.device("cuda", 0)

    def make(dtype: Dtype) -> Any:
        model = build(cuda_shape, Placement(device, dtype))
        for module in model.modules():
            parameters: Mapping[str, Tensor] = dict(module.named_parameters(recurse=False))
            if parameters:
                host = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in parameters.items()}
                filled: Any = module
                filled.fill(host)
        assert all(parameter.device == device for parameter in model.parameters())
        return model

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        # A build without CUDA has no device guard, which the method asks for and the operator does not.
        copy = torch.ops.aten.copy_.default
        patch.setattr(torch.Tensor, "copy_", lambda target, source: copy(target, source))
        yield make
