"""How tests compute what a checkpoint says, and models on a device that is not there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cortex.neuron.engine.runner import load_runner
from cortex.neuron.models import registry
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import ModelShape, Rope, YarnScaling
from cortex.neuron.nn.placement import Dtype, Placement, Share
from cortex.neuron.nn.plan import Run, Segment, StepPlan, parts
from cortex.neuron.weights.checkpoint import Checkpoint, open_checkpoint
from cortex.neuron.weights.loader import load
from cortex.wire.errors import LoadFailed

CACHE = 400
"""Tokens."""
SLOTS = 10
NAN = float("nan")


class Computing:
    """A checkpoint as the engine computes it, fp32 unless another form is asked for.

    A sequence has the slot of the row in which it begins. What nobody has written is NaN.
    """

    def __init__(self, path: Path, dtype: Dtype = "float32", stride: int | None = None) -> None:
        placement = Placement(torch.device("cpu"), dtype)
        runner = load_runner(
            path,
            placement,
            cache_rows=CACHE,
            report=lambda done, total: None,
            working=SLOTS,
            stride=stride,
        )
        runner._cache._stored.fill_(NAN)
        for stored in [part for pool in runner._pools for part in pool.stored]:
            stored.fill_(NAN)
        self.shape = runner.shape
        self.weight_bytes, self.cache_bytes = runner.weight_bytes, runner.cache_bytes
        self.model = runner._model
        self._runner = runner
        self._slots: dict[int, int] = {}

    def logits(self, plan: StepPlan) -> Tensor:
        """fp32 [wanted, vocabulary]."""
        segments = [
            msgspec.structs.replace(part, slot=self._slots.setdefault(part.runs[0][0], len(self._slots)))
            for part in plan.segments
        ]
        return self._runner.logits(msgspec.structs.replace(plan, segments=segments))

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


class Fits(Exception):
    """All tensors have been checked, and none is read."""


def unnoticed(path: Path, world: int) -> set[tuple[str, int]]:
    """Tensors of a checkpoint, and axes along which they could have twice the size, without a refusal that
    names them by one of so many ranks.
    """

    def fits(done: int, total: int) -> None:
        raise Fits

    with open_checkpoint(path) as checkpoint:
        shape, kind, found = read_shape(checkpoint), checkpoint.kind, checkpoint.tensors
        family = registry.family(shape.architecture)
        shares = [Share(rank, world) for rank in range(world)]
        models = [family.build(shape, Placement(torch.device("cpu"), "float32", share)) for share in shares]
        sources = [family.sources(shape, kind, share) for share in shares]

        def refused(tensor: str, axis: int) -> bool:
            old = found[tensor].shape
            grown = (*old[:axis], 2 * old[axis], *old[axis + 1 :])
            tensors = {**found, tensor: msgspec.structs.replace(found[tensor], shape=grown)}
            other = Checkpoint(kind, path, checkpoint.architecture, tensors)
            said = ""
            for model, of_rank in zip(models, sources, strict=True):
                with pytest.raises((LoadFailed, Fits)) as ended:
                    load(model, of_rank, other, fits)
                said += str(ended.value)
            return f"{tensor} " in said and str(list(grown)) in said and str(found[tensor].file) in said

        axes = [(name, axis) for name, tensor in found.items() for axis in range(len(tensor.shape))]
        return {at for at in axes if not refused(*at)}


@pytest.fixture(scope="session")
def unnoticed_sizes() -> Callable[[Path, int], set[tuple[str, int]]]:
    return unnoticed


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
        rope=Rope(10000.0, yarn=YarnScaling(4.0, 64), attention=1.25),
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
