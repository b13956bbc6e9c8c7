"""Matrices that are written into oneDNN's layout, byte for byte against oneDNN's own packing."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from cortex.neuron.nn import blocked
from cortex.neuron.nn.blocked import BlockedMatrix, known
from cortex.neuron.nn.matrix import IntegerMatrix, OneDnn

pytestmark = pytest.mark.skipif(
    "onednn" not in torch.backends.quantized.supported_engines or not torch.cpu._is_vnni_supported(),
    reason="oneDNN's int8 products are exact on CPUs with VNNI only",
)
SHAPES = [(64, 64), (128, 192), (50, 72), (33, 63), (130, 1000), (1, 1)]


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def content(packed: Tensor) -> Tensor:
    return blocked._memory(packed).clone()


@pytest.mark.parametrize("shape", SHAPES)
def test_written_matrices_are_what_onednn_packs(shape: tuple[int, int]) -> None:
    """In runs that begin and end anywhere, in any order."""
    first, second = (integers(*shape, seed=seed) for seed in (1, 2))
    template = torch.ops.onednn.qlinear_prepack(first, None)
    if not known(template, first):
        pytest.skip("this CPU has another layout")
    written = BlockedMatrix(template.clone(), *shape)
    cuts = sorted({0, shape[0] // 3, shape[0] // 2, shape[0]})
    for start, stop in reversed(list(itertools.pairwise(cuts))):
        written.put(start, second[start:stop].contiguous())
    expected = torch.ops.onednn.qlinear_prepack(second, None)
    assert torch.equal(content(written.packed), content(expected))
    assert torch.equal(content(template), content(torch.ops.onednn.qlinear_prepack(first, None)))


def test_another_content_is_not_taken_for_the_layout() -> None:
    weight = integers(128, 64, seed=1)
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    for row, column in ((0, 0), (127, 63), (70, 5)):
        other = weight.clone()
        other[row, column] ^= 1
        assert not known(packed, other)


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(128, 192, dtype=torch.int8),
        torch.full((128, 192), -3, dtype=torch.int8),
        integers(128, 1, seed=1).repeat(1, 192),
        integers(1, 192, seed=1).repeat(128, 1),
        integers(128, 192, seed=1).clamp(-1, 1),
        integers(128, 4, seed=1).repeat(1, 48),
        integers(32, 1, seed=1).repeat(1, 4),
    ],
    ids=["zeros", "one number", "inputs alike", "outputs alike", "signs", "words alike", "within words"],
)
def test_a_matrix_that_looks_alike_in_other_layouts_is_no_evidence(weight: Tensor) -> None:
    assert not known(torch.ops.onednn.qlinear_prepack(weight, None), weight)


def test_weights_as_models_have_them_are_evidence() -> None:
    """Also with a plane's lower bits, inputs that are pruned and outputs that are zero."""
    chance = torch.Generator().manual_seed(4)
    weight = torch.randn(300, 400, generator=chance).mul_(30).clamp_(-127, 127).to(torch.int8)
    assert blocked.tells_places_apart(weight)
    assert blocked.tells_places_apart(integers(300, 400, seed=5))
    weight[:, ::10] = 0
    weight[::10] = 0
    assert blocked.tells_places_apart(weight)


@pytest.mark.parametrize("planes", [1, 2])
def test_the_second_matrix_of_a_shape_is_made_like_the_first(planes: int) -> None:
    """Both ways give the same bytes as planes that are made at once and packed by oneDNN."""
    kernel = OneDnn()
    chance = torch.Generator().manual_seed(3)
    kept = []
    for _ in range(3):
        weight = torch.randn(200, 330, generator=chance) * torch.rand(200, 1, generator=chance)
        weight[7] = 0
        made = IntegerMatrix(weight, None, planes, kernel)
        kept.append(made)
        packed, scale = at_once(weight, planes)
        assert torch.equal(content(made._packed[0]), content(packed))
        assert torch.equal(made._packed[1], scale / kernel.steps)


def at_once(weight: Tensor, planes: int) -> tuple[Tensor, Tensor]:
    scale = weight.abs().amax(1).div(127 if planes == 1 else 127 * 256).clamp_min(1e-30)
    number = weight.div(scale.unsqueeze(1)).round()
    if planes == 2:
        upper = number.add(128).div(256).floor()
        number = torch.cat((upper, number - 256 * upper))
        scale = torch.cat((scale * 256, scale))
    return torch.ops.onednn.qlinear_prepack(number.to(torch.int8), None), scale


def test_templates_go_with_the_matrices_that_use_them() -> None:
    kernel = OneDnn()
    made = IntegerMatrix(integers(64, 64, seed=1).float(), None, 1, kernel)
    if not kernel._known:
        pytest.skip("this CPU has another layout")
    del made
    assert not kernel._known
