"""Checkpoints in FP8 are, number by number, the same models with the weights that these mean in fp32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cortex.hookspecs import LoadOrder
from cortex.neuron.models import registry
from cortex.neuron.models.reading import read_shape
from cortex.neuron.nn import matrix
from cortex.neuron.nn.placement import Placement, Share
from cortex.neuron.torch_engine import TorchFactory
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.reading import Parameter, Stored, stored_bytes
from cortex.wire.errors import LoadFailed

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    """`block` ends where no head, no part of a fused projection and no share of a rank does."""

    kind: str
    block: tuple[int, int] = (20, 28)
    dtype: torch.dtype = torch.bfloat16
    stacked: bool = False
    options: Mapping[str, Any] = MappingProxyType({})


CASES = {
    "qwen3": Case("qwen3"),
    "qwen3-large-blocks": Case("qwen3", (128, 128), torch.float32),
    "qwen3_moe": Case("qwen3_moe", options={"num_experts": 6, "tie_word_embeddings": True}),
    "qwen3_moe-stacked": Case("qwen3_moe", stacked=True),
    "qwen3_5": Case("qwen3_5_text", options={"linear_num_key_heads": 2, "linear_num_value_heads": 4}),
    "qwen3_5_moe-stacked": Case("qwen3_5_moe_text", (12, 20), torch.float32, stacked=True),
}
IDS = torch.randint(0, 199, (60,), generator=torch.Generator().manual_seed(1)).tolist()


@pytest.fixture(scope="module", params=CASES)
def twins(request: pytest.FixtureRequest, make_tiny: Any, make_twins: Any) -> Any:
    case = CASES[request.param]
    tiny = make_tiny(case.kind, **case.options)
    return make_twins(tiny.directory, case.block, case.dtype, stacked=case.stacked)


@pytest.mark.parametrize("dtype", ["float32", "packed16", "int8"])
def test_logits_are_those_of_the_weights_that_are_meant(twins: Any, computing: Any, dtype: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "FEW_WEIGHTS", 0)
        found, expected = (computing(path, dtype).in_chunks(IDS, [40, 1, 19]) for path in twins)
    assert expected.std() > 0.1
    assert torch.equal(found, expected)


def parameters(path: Path, share: Share) -> Iterator[tuple[str, Tensor]]:
    """All that a rank reads, whole and in parts; it counts the bytes that were foretold."""
    with open_checkpoint(path) as checkpoint:
        shape, counted = read_shape(checkpoint), [0]
        family = registry.family(shape.architecture)
        model = family.build(shape, Placement(torch.device("cpu"), "float32", share))
        sources = family.sources(shape, checkpoint.kind, share)
        for name, empty in model.named_parameters():
            source, stored = sources[name], Stored(checkpoint)
            read = Parameter(tuple(empty.shape), empty.dtype, source, stored, counted.append)
            counted.clear()
            yield name, read[:]
            assert sum(counted) == sum(stored_bytes(p, checkpoint.tensors[p.tensor]) for p in source)
            yield name, read[3:17]


@pytest.mark.parametrize("world", [1, 2])
def test_a_rank_reads_the_weights_that_are_meant(twins: Any, world: int) -> None:
    for rank in range(world):
        pairs = zip(*(parameters(path, Share(rank, world)) for path in twins), strict=True)
        for (name, found), (other, expected) in pairs:
            assert name == other
            assert torch.equal(found, expected), name


def test_a_plan_is_that_of_the_weights_as_they_are_held(twins: Any) -> None:
    plans = [TorchFactory().plan(LoadOrder(model_id="m", path=str(path))) for path in twins]
    assert plans[0].bytes_per_device == plans[1].bytes_per_device


@pytest.mark.parametrize(
    ("gone", "other"),
    [
        ("model.layers.1.self_attn.o_proj.weight_scale_inv", None),
        ("model.layers.1.mlp.experts.gate_up_proj_scale_inv", None),
        ("model.layers.1.mlp.experts.down_proj_scale_inv", torch.ones(6, 2)),
    ],
)
def test_a_plan_misses_scales_already(
    make_tiny: Any, make_twins: Any, gone: str, other: Tensor | None
) -> None:
    path = make_twins(make_tiny("qwen3_moe").directory, (20, 28), torch.float32, stacked=True).fp8
    scales = load_file(path / "b.safetensors")
    del scales[gone]
    save_file(scales | ({} if other is None else {gone: other}), path / "b.safetensors")
    with pytest.raises(LoadFailed) as caught:
        TorchFactory().plan(LoadOrder(model_id="m", path=str(path)))
    assert gone in caught.value.message
    assert f"tensor {gone.removesuffix('_scale_inv')} " in caught.value.message
    assert f"{path / 'a.safetensors'}" in caught.value.message


def test_twice_the_size_of_any_tensor_is_noticed(twins: Any, unnoticed_sizes: Any) -> None:
    """Scales themselves are held against their tensors' shapes when the checkpoint is opened."""
    assert {name for name, _ in unnoticed_sizes(twins.fp8, 2) if "_scale" not in name} == set()
