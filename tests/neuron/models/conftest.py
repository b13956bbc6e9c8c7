"""How tests compute what a checkpoint says; checkpoints in FP8; and models on a device that is not there."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import torch
from safetensors.torch import load_file, save_file
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


# --- checkpoints in FP8 ----------------------------------------------------------------------------

QUANTISED = re.compile(
    r"(self_attn|mlp|shared_expert|experts\.\d+)\.\w+_proj\.weight|in_proj_(qkv|qkvz|z)\.|out_proj\."
)
"""Matrices that are in FP8 where a model is published in it."""
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")


def stacked_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts not each by itself but one after the other, gate and up fused."""
    found = {name: weight for name, weight in weights.items() if not EXPERT.fullmatch(name)}
    parts: dict[tuple[str, str], list[tuple[int, Tensor]]] = defaultdict(list)
    for name, weight in weights.items():
        if of := EXPERT.fullmatch(name):
            parts[of[1], of[3]].append((int(of[2]), weight))
    stacks = {
        key: torch.stack([weight for _, weight in sorted(part, key=lambda at: at[0])])
        for key, part in parts.items()
    }
    for experts in {experts for experts, _ in stacks}:
        found[f"{experts}.gate_up_proj"] = torch.cat((stacks[experts, "gate"], stacks[experts, "up"]), 1)
        found[f"{experts}.down_proj"] = stacks[experts, "down"]
    return found


def spread(scales: Tensor, block: tuple[int, int], shape: tuple[int, ...]) -> Tensor:
    """A scale for each number of a tensor of this shape."""
    whole = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return whole[..., : shape[-2], : shape[-1]]


def in_fp8(weight: Tensor, block: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix or a stack of them in 8 bits, and its scales."""
    missing = (-weight.shape[-1] % block[1], -weight.shape[-2] % block[0])
    padded = torch.nn.functional.pad(weight, (0, missing[0], 0, missing[1]))
    blocks = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scales = blocks.abs().amax((-3, -1)).div(448).to(dtype)
    numbers = weight / spread(scales, block, tuple(weight.shape))
    return numbers.clamp(-448, 448).to(torch.float8_e4m3fn), scales


class Twins(NamedTuple):
    """A checkpoint in FP8, and one with the numbers that it means in fp32."""

    fp8: Path
    plain: Path


def write_twins(
    origin: Path, folder: Path, block: tuple[int, int], dtype: torch.dtype, stacked: bool = False
) -> Twins:
    """Of the weights of a checkpoint, with the scales in a file of their own, as a shard may end anywhere."""
    weights: dict[str, Tensor] = {}
    for file in origin.glob("*.safetensors"):
        weights |= load_file(file)
    eights, plain, scales = {}, {}, {}
    for name, weight in (stacked_experts(weights) if stacked else weights).items():
        if "conv1d" in name or (weight.dim() < 3 and not QUANTISED.search(name)):
            eights[name] = plain[name] = weight
            continue
        eights[name], scales[f"{name}_scale_inv"] = in_fp8(weight, block, dtype)
        plain[name] = eights[name].float() * spread(scales[f"{name}_scale_inv"], block, tuple(weight.shape))
        scales[f"{name.removesuffix('.weight')}.activation_scale"] = torch.full((1,), 7.0)  # is not used
    assert len(scales) > 20
    twins = Twins(folder / "fp8", folder / "plain")
    config = json.loads((origin / "config.json").read_text())
    how = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    for path, more in ((twins.fp8, {"quantization_config": how}), (twins.plain, {})):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config | more))
    save_file(eights, twins.fp8 / "a.safetensors")
    save_file(scales, twins.fp8 / "b.safetensors")
    save_file(plain, twins.plain / "model.safetensors")
    return twins


@pytest.fixture(scope="session")
def make_twins(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Twins]:
    def make(origin: Path, *how: Any, **more: Any) -> Twins:
        return write_twins(origin, tmp_path_factory.mktemp("twins"), *how, **more)

    return make


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
