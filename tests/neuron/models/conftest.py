"""How tests compute what a checkpoint says, and models on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cortex.neuron.engine.cache import RunCache
from cortex.neuron.models import registry
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import ModelShape, Rope
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.plan import Run, Segment, StepPlan, parts
from cortex.neuron.nn.step import Span, States, prepare
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.loader import load

CACHE = 400
"""Tokens."""


class State(NamedTuple):
    """Of one layer, for ten sequences, and NaN before they begin."""

    conv: Tensor
    memory: Tensor

    @staticmethod
    def of(shape: ModelShape) -> State:
        sizes = shape.delta
        assert sizes is not None
        nothing = float("nan")
        memory = torch.full((10, sizes.value_heads, sizes.key_width, sizes.value_width), nothing)
        return State(torch.full((10, sizes.channels, sizes.kernel - 1), nothing), memory)


class Computing:
    """A checkpoint as the engine computes it, fp32 unless another form is asked for.

    A sequence's states are those of the row in which it begins.
    """

    def __init__(self, path: Path, dtype: Dtype = "float32") -> None:
        placement = Placement(torch.device("cpu"), dtype)
        with open_checkpoint(path) as checkpoint:
            shape = self.shape = read_shape(checkpoint)
            family = registry.family(shape.architecture)
            self.model: Any = family.build(shape, placement)
            sources = family.sources(shape, checkpoint.kind, placement.share)
            load(self.model, sources, checkpoint, lambda done, total: None)
        self.weight_bytes = sum(getattr(module, "nbytes", 0) for module in self.model.modules())
        layers = shape.attention_layers
        near = [at for at, index in enumerate(layers) if shape.kind(index) == "sliding"]
        cache = RunCache(len(layers), CACHE, shape.kv_heads, shape.head_dim, placement.device, near=near)
        self.cache_bytes = cache.nbytes
        self._cache = cache
        self._slots: dict[int, int] = {}
        self._states = {index: State.of(shape) for index in shape.delta_layers}
        with_keys = iter(cache.layers)
        self._caches = [self._states.get(index) or next(with_keys) for index in range(shape.layers)]

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> Tensor:
        """fp32 [wanted, vocabulary]."""
        self._cache.copy(plan.copies)
        step = prepare(plan, torch.device("cpu"), window=self.shape.window)
        if self._states:
            step = step._replace(states=self._states_of(plan))
        found: Tensor = self.model(step, self._caches)
        return found

    def _states_of(self, plan: StepPlan) -> States:
        rows, slots, spans, row = [], [], [], 0
        for part in plan.segments:
            slot = self._slots.setdefault(part.runs[0][0], len(self._slots))
            if part.start == 0:
                for state in self._states.values():
                    state.conv[slot] = state.memory[slot] = 0
            if part.length == 1:
                rows.append(row)
                slots.append(slot)
            else:
                spans.append(Span(row, row + part.length, slot))
            row += part.length
        single = (torch.tensor(rows), torch.tensor(slots)) if rows else (None, None)
        return States(*single, rows == [*range(len(rows))], tuple(spans))

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


@pytest.fixture(scope="session", params=["plain", "rich"])
def cuda_shape(request: pytest.FixtureRequest) -> ModelShape:
    """Of a model with hardly anything, and of one with all that attention may have."""
    plain = ModelShape(
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
    if request.param == "plain":
        return plain
    return msgspec.structs.replace(
        plain,
        architecture="gemma3",
        qk_norm=True,
        gated=True,
        rotary_dim=4,
        post_norms=True,
        activation="gelu_tanh",
        kinds=("sliding", "full"),
        window=16,
        local_rope=Rope(100.0),
        query_scale=0.5,
        embedding_scale=7.0,
        logit_cap=30.0,
    )


@pytest.fixture(scope="module")
def fake_model(cuda_shape: ModelShape) -> Iterator[Callable[[Dtype], Any]]:
    """Makes filled models on it; under the mode that makes all tensors fake."""
    device = torch.device("cuda", 0)

    def make(dtype: Dtype) -> Any:
        model = registry.family(cuda_shape.architecture).build(cuda_shape, Placement(device, dtype))
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
