"""Quantisation for CUDA devices: the numbers on the CPU, the kernels on a device that is not there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from cortex.neuron.engine import loading
from cortex.neuron.engine.messages import Load
from cortex.neuron.nn import quant
from cortex.neuron.nn.linear import Linear
from cortex.neuron.nn.packing import most_bytes
from cortex.neuron.nn.placement import Dtype, Placement
from cortex.neuron.nn.quant import FEW_ROWS, Int4Matrix, Int8Matrix, pairs, quantise, quantised4, quantised8
from cortex.wire.errors import LoadFailed

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def dequantised4(codes: Tensor, scales: Tensor, group: int) -> Tensor:
    scale, zero = (part.float().T.repeat_interleave(group, 1) for part in scales.unbind(-1))
    return (codes.float() - 8) * scale + zero


def test_no_weight_in_8_bits_is_off_by_more_than_half_a_step() -> None:
    weight = random(40, 96) * torch.logspace(-6, 3, 40).unsqueeze(1)
    weight[7] = 0
    codes, scale = quantised8(weight)
    assert (codes.dtype, codes.abs().max()) == (torch.int8, 127)
    off = (codes * scale.unsqueeze(1) - weight).abs()
    assert (off <= 0.5001 * scale.unsqueeze(1)).all()
    assert torch.equal(codes[7], torch.zeros(96, dtype=torch.int8))


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_no_weight_in_4_bits_is_off_by_more_than_half_a_step_and_the_rounding(
    group: int, shift: float
) -> None:
    """The ends of a range move by what rounding the zero point and 8 scales to bf16 may do: 2^-9 of each."""
    weight = (random(24, 256) + shift) * torch.logspace(-4, 2, 24).unsqueeze(1)
    codes, scales = quantised4(weight, group)
    assert (codes.min(), codes.max(), scales.shape) == (0, 15, (256 // group, 24, 2))
    scale, zero = (part.float().T.repeat_interleave(group, 1) for part in scales.unbind(-1))
    off = (dequantised4(codes, scales, group) - weight).abs()
    assert (off <= 0.5001 * scale + 2**-9 * (zero.abs() + 8 * scale)).all()


def test_finer_groups_lose_less() -> None:
    weight = random(64, 512)
    lost = [
        float((dequantised4(*quantised4(weight, group), group) - weight).norm()) for group in (32, 64, 128)
    ]
    assert lost == sorted(lost)
    assert lost[-1] < 0.12 * weight.norm()


def test_groups_of_one_value_keep_it() -> None:
    weight = torch.tensor([0.0, 1.5, -2.0]).unsqueeze(1).expand(3, 64)
    assert torch.equal(dequantised4(*quantised4(weight, 32), 32), weight)


def test_large_weights_are_quantised_part_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(50, 64), random(40, 64, seed=2)
    whole = (*quantised8(weight), *quantised4(weight, 32), Int8Matrix(weight, None, CPU)(x))
    monkeypatch.setattr(quant, "PART", 3 * 64 + 5)
    parts = (*quantised8(weight), *quantised4(weight, 32), Int8Matrix(weight, None, CPU)(x))
    assert all(torch.equal(a, b) for a, b in zip(whole[:-1], parts[:-1], strict=True))
    torch.testing.assert_close(parts[-1], whole[-1], rtol=0, atol=1e-4)  # sums of a part in another order


@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_damaged_weights_show(damage: float) -> None:
    weight = random(8, 64)
    weight[3, 5] = damage
    assert not Int8Matrix(weight, None, CPU)(random(1, 64)).isfinite().all()
    assert not dequantised4(*quantised4(weight, 32), 32).isfinite().all()


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 90])
@pytest.mark.parametrize("biased", [False, True])
def test_8_bits_multiply_by_what_they_stand_for(rows: int, biased: bool) -> None:
    """CPUs have the kernel too."""
    weight, x, bias = random(50, 72), random(rows, 72, seed=2), random(50, seed=3) if biased else None
    codes, scale = quantised8(weight)
    matrix = Int8Matrix(weight, bias, CPU)
    assert torch.allclose(matrix(x), F.linear(x, codes * scale.unsqueeze(1), bias), atol=1e-4)
    assert matrix.nbytes == 50 * 72 + 4 * 50


@pytest.mark.parametrize("group", [32, 64, 128])
def test_4_bits_stand_for_what_torchs_kernel_takes_them_for(group: int) -> None:
    """The one for CPUs, which has another layout, and the same scales and zero points."""
    weight, x = random(32, 256), random(5, 256, seed=2).bfloat16()
    codes, scales = quantised4(weight, group)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int(), 2)
    found = torch._weight_int4pack_mm_for_cpu(x, packed, group, scales).float()
    expected = F.linear(x.float(), dequantised4(codes, scales, group))
    assert (found - expected).norm() < 5e-3 * expected.norm()


def test_two_codes_share_a_byte() -> None:
    codes = torch.tensor([[1, 2, 15, 0], [8, 9, 0, 15]], dtype=torch.uint8)
    assert pairs(codes).tolist() == [[0x12, 0xF0], [0x89, 0x0F]]


# --- a CUDA device that is not there --------------------------------------------------------------


@pytest.fixture
def cuda() -> Iterator[torch.device]:
    with FakeTensorMode():
        yield torch.device("cuda", 0)


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    ("dtype", "inputs", "outputs", "kind", "group"),
    [
        ("int8", 72, 50, Int8Matrix, 0),
        ("int4", 72, 50, Int8Matrix, 0),
        ("int4", 96, 50, Int4Matrix, 32),
        ("int4", 64, 48, Int4Matrix, 64),
        ("int4", 256, 48, Int4Matrix, 64),
    ],
)
def test_a_linear_layer_on_cuda_is_quantised(
    cuda: torch.device,
    dtype: Dtype,
    inputs: int,
    outputs: int,
    kind: type[Int8Matrix] | type[Int4Matrix],
    group: int,
    biased: bool,
    rows: int,
) -> None:
    linear = Linear(inputs, outputs, Placement(cuda, dtype), bias=biased)
    parameters = dict(linear.named_parameters())
    linear.fill({name: torch.empty(p.shape, dtype=p.dtype) for name, p in parameters.items()})
    assert linear.weight is linear.bias is None
    matrix = linear.matrix
    assert isinstance(matrix, kind)
    assert {part.device for part in (matrix._codes, matrix._scales)} == {cuda}
    found = linear(torch.empty(rows, inputs, device=cuda))
    assert (found.shape, found.dtype, found.device) == ((rows, outputs), torch.float32, cuda)
    assert linear.nbytes - 4 * outputs * biased <= most_bytes(inputs, outputs, dtype)
    assert getattr(matrix, "_group", 0) == group


def test_every_matrix_finds_its_form(cuda: torch.device) -> None:
    for inputs, tiles in ((32, 2), (64, 4), (128, 8), (192, 4)):
        matrix = quantise(torch.empty(8, inputs), None, "int4", cuda)
        assert isinstance(matrix, Int4Matrix)
        assert matrix._codes.shape == (1, inputs // (16 * tiles), 32, tiles // 2)


def order(device: str) -> Load:
    return Load(
        path="/nowhere", device=device, dtype="int4", context=1, cache_tokens=1, prefill_chunk=1, threads=1
    )


@pytest.mark.parametrize(
    ("device", "capability", "said"),
    [
        ("cpu", (9, 0), "on CUDA devices only; use int8"),
        ("GPU-1", (7, 5), "capability 8.0; this one has 7.5"),
    ],
)
def test_a_device_without_a_kernel_for_4_bits_is_refused(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: tuple[int, int], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(LoadFailed, match=said):
        loading._placement(order(device))


def test_a_device_with_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert loading._placement(order("GPU-1")).quantised
