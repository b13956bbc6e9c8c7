"""The packed forms against products in fp64, with both integer kernels wherever the CPU has them."""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cortex.neuron.nn import matrix as forms
from cortex.neuron.nn.matrix import (
    Fbgemm,
    HalfMatrix,
    IntegerKernel,
    IntegerMatrix,
    OneDnn,
    StackedMatrix,
    pack,
)
from cortex.neuron.nn.packing import most_bytes, packed_bytes

ENGINES = torch.backends.quantized.supported_engines
needs_onednn = pytest.mark.skipif("onednn" not in ENGINES, reason="this build of torch lacks oneDNN")
needs_amx = pytest.mark.skipif(
    not forms.has_matrix_unit(),
    reason="only AMX multiplies signed activations, elsewhere oneDNN's reference code takes minutes",
)
needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="this CPU lacks VNNI")
needs_fbgemm = pytest.mark.skipif("fbgemm" not in ENGINES, reason="this build of torch lacks FBGEMM")
each_kernel = pytest.mark.parametrize(
    "kernel",
    [
        pytest.param(OneDnn(), id="onednn", marks=needs_amx),
        pytest.param(Fbgemm(127), id="fbgemm-vnni", marks=[needs_fbgemm, needs_vnni]),
        pytest.param(Fbgemm(63), id="fbgemm", marks=needs_fbgemm),
    ],
)
each_form = pytest.mark.parametrize("planes", [1, 2])

WEIGHT_STEPS = {1: 127, 2: 127 * 256}
"""How many steps a weight's form has up to the largest weight of an output."""


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    exact = x.double() @ weight.double().T
    return exact if bias is None else exact + bias.double()


def most_error(x: Tensor, weight: Tensor, planes: int, kernel: IntegerKernel) -> Tensor:
    """What a form may be off by at worst, every rounding half a step in the worst direction: [T, outputs].

    With two planes, also what the two lower ones might have added.
    """
    a, w = x.abs().double(), weight.abs().double()
    step_a = a.amax(1, keepdim=True) / kernel.steps
    step_w = w.amax(1) / WEIGHT_STEPS[planes]
    worst = step_a / 2 * w.sum(1) + a.sum(1, keepdim=True) * step_w / 2 + step_a * step_w / 4 * x.shape[1]
    if planes == 2:
        worst = worst + step_a * step_w * (kernel.base / 2) * 128 * x.shape[1]
    return worst + 1e-6 * a @ w.T + 1e-25


def test_a_half_matrix_loses_nothing_but_the_rounding_of_its_weight() -> None:
    weight, bias = random(50, 72, seed=2), random(50, seed=3)
    for rows in (1, 3, 70):
        x = random(rows, 72)
        for added in (None, bias):
            expected = product(x, weight.half(), added)
            assert torch.allclose(HalfMatrix(weight, added)(x).double(), expected, atol=1e-5)


@pytest.mark.parametrize("bias", [None, random(50, seed=3)])
@pytest.mark.parametrize("damage", [float("nan"), float("inf"), float("-inf")])
def test_a_half_matrix_does_not_hide_weights_that_are_no_numbers(damage: float, bias: Tensor | None) -> None:
    weight, x = random(50, 72, seed=2), random(3, 72)
    weight[7, 5] = damage
    found = HalfMatrix(weight, bias)(x)
    assert found[:, 7].isnan().all()
    rest = [output for output in range(50) if output != 7]
    assert torch.allclose(found[:, rest].double(), product(x, weight.half(), bias)[:, rest], atol=1e-5)


def test_a_half_matrix_of_some_columns_is_bounded_like_a_whole_one() -> None:
    """FBGEMM's packing bounds weights to fp16 in place, and in a copy that it drops where they lie apart."""
    wide, x = random(50, 100, seed=2), random(3, 72)
    wide[7, 20] = 1e6
    bounded = wide[:, 10:82].half()
    bounded[7, 10] = torch.finfo(torch.float16).max
    found = HalfMatrix(wide[:, 10:82], None)(x)
    assert torch.allclose(found.double(), product(x, bounded), rtol=1e-5, atol=1e-5)


@each_kernel
@pytest.mark.parametrize(
    ("planes", "most"),
    # A normal weight is some 3.5 / 127 steps wide and off by a twelfth root of that; of two planes, half of
    # the error is the product of the lower ones. Without VNNI activations have two bits less.
    [(1, {256: 0.01, 254: 0.01, 126: 0.01}), (2, {256: 1.2e-4, 254: 1.2e-4, 126: 3e-4})],
)
def test_normal_numbers_come_out_as_exact_as_the_form_is_fine(
    kernel: IntegerKernel, planes: int, most: dict[int, float]
) -> None:
    for inputs in (64, 576, 1536):
        x, weight, bias = random(40, inputs), random(96, inputs, seed=2), random(96, seed=3)
        found = IntegerMatrix(weight, bias, planes, kernel)(x)
        expected = product(x, weight, bias)
        assert found.dtype == torch.float32
        assert (found - expected).norm() <= most[kernel.base] * expected.norm()


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows, weight and bias of any shape, rows and outputs and inputs of very different size."""
    rows, outputs = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 15, 16, 17, 64, 65, 130]))
    inputs = draw(st.sampled_from([1, 2, 3, 31, 63, 64, 65, 72, 100, 128, 200, 511, 513, 700]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))

    def some(*shape: int) -> Tensor:
        sizes = torch.randint(-4, 5, (2, *shape), generator=generator)
        near, far = (10.0 ** sizes[:, :, :1].float(), 10.0 ** (sizes[:, :1].float() / 4))
        values = torch.randn(shape, generator=generator) * near[0] * far[1]
        return values * (torch.rand(shape, generator=generator) > draw(st.sampled_from([0.0, 0.5, 0.95])))

    bias = torch.randn(outputs, generator=generator) if draw(st.booleans()) else None
    return some(rows, inputs), some(outputs, inputs), bias


@each_kernel
@each_form
@settings(max_examples=60)
@given(problem=problems())
def test_no_result_is_off_by_more_than_its_roundings(
    kernel: IntegerKernel, planes: int, problem: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    x, weight, bias = problem
    found = IntegerMatrix(weight, bias, planes, kernel)(x)
    most = most_error(x, weight, planes, kernel)
    if bias is not None:
        most = most + 1e-6 * bias.abs()
    assert found.shape == (x.shape[0], weight.shape[0])
    assert ((found - product(x, weight, bias)).abs() <= most).all()


@pytest.mark.slow
@each_kernel
@each_form
@settings(max_examples=40)
@given(problem=problems())
def test_a_row_alone_is_the_row_among_others_bit_by_bit(
    kernel: IntegerKernel, planes: int, problem: tuple[Tensor, Tensor, Tensor | None]
) -> None:
    x, weight, bias = problem
    matrix = IntegerMatrix(weight, bias, planes, kernel)
    together = matrix(x)
    assert all(torch.equal(matrix(x[row : row + 1])[0], together[row]) for row in range(x.shape[0]))


@each_kernel
@each_form
def test_however_many_and_large_its_batch_mates_a_row_comes_out_the_same(
    kernel: IntegerKernel, planes: int
) -> None:
    matrix = IntegerMatrix(random(200, 576), random(200, seed=2), planes, kernel)
    own = random(1, 576, seed=3)
    alone = matrix(own)
    for others in range(1, 40):
        mates = random(others, 576, seed=others)
        mates[others // 2] *= 1000
        mates[0, others] = 1e6
        for place in {0, others // 2, others}:
            batch = torch.cat((mates[:place], own, mates[place:]))
            assert torch.equal(matrix(batch)[place], alone[0])


@each_kernel
@each_form
def test_a_view_of_rows_that_do_not_lie_together_is_taken_as_it_is(
    kernel: IntegerKernel, planes: int
) -> None:
    matrix = IntegerMatrix(random(20, 64), None, planes, kernel)
    wide = random(5, 200, seed=2)
    assert torch.equal(matrix(wide[:, 100:164]), matrix(wide[:, 100:164].contiguous()))


@each_kernel
@each_form
def test_rows_and_outputs_of_zeros_give_zeros(kernel: IntegerKernel, planes: int) -> None:
    x, weight, bias = random(3, 70), random(6, 70, seed=2), random(6, seed=3)
    x[1] = weight[4] = 0
    assert torch.equal(IntegerMatrix(weight, None, planes, kernel)(x)[1], torch.zeros(6))
    found = IntegerMatrix(weight, bias, planes, kernel)(x)
    assert torch.equal(found[1], bias)
    assert torch.equal(found[:, 4], bias[4].expand(3))


@each_kernel
@each_form
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_no_number_spoils_all_of_itself_and_nothing_else(
    kernel: IntegerKernel, planes: int, bad: float
) -> None:
    x, weight = random(4, 70), random(6, 70, seed=2)
    clean = IntegerMatrix(weight, None, planes, kernel)(x)
    x[2, 33] = bad
    found = IntegerMatrix(weight, None, planes, kernel)(x)
    assert not found[2].isfinite().any()
    assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])
    half = HalfMatrix(weight, None)(x)
    assert half.isfinite().all(1).tolist() == [True, True, False, True]


@each_kernel
@each_form
def test_a_damaged_weight_shows_in_its_output_and_no_other(kernel: IntegerKernel, planes: int) -> None:
    x, weight = random(4, 70), random(6, 70, seed=2)
    weight[3, 5] = float("nan")
    found = IntegerMatrix(weight, None, planes, kernel)(x)
    assert found.isfinite().all(0).tolist() == [True, True, True, False, True, True]


@each_kernel
@pytest.mark.parametrize(
    ("planes", "most", "most_of_others"),
    [
        (1, {256: 0.01, 254: 0.01, 126: 0.01}, {256: 0.4, 254: 0.4, 126: 0.4}),
        (2, {256: 3e-4, 254: 3e-4, 126: 1e-3}, {256: 0.015, 254: 0.015, 126: 0.05}),
    ],
)
def test_one_outlier_among_the_inputs_leaves_the_error_small(
    kernel: IntegerKernel, planes: int, most: dict[int, float], most_of_others: dict[int, float]
) -> None:
    """As the first tokens of a text have it: small next to the results, which the outlier makes large, and
    with two planes next to what the other inputs add to them.
    """
    x, weight = random(20, 576), random(96, 576, seed=2)
    x[:, 100] *= 1000
    expected = product(x, weight)
    others = x.clone()
    others[:, 100] = 0
    error = (IntegerMatrix(weight, None, planes, kernel)(x) - expected).norm()
    assert error <= most[kernel.base] * expected.norm()
    assert error <= most_of_others[kernel.base] * product(others, weight).norm()


@each_kernel
def test_the_weight_is_not_changed_by_packing_it(kernel: IntegerKernel) -> None:
    weight = random(50, 72)
    before = weight.clone()
    for planes in (1, 2):
        IntegerMatrix(weight, None, planes, kernel)
    assert torch.equal(weight, before)


# --- large matrices in parts ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["packed16", "int8"])
@pytest.mark.parametrize("outputs", [63, 191, 192, 193, 384, 500])
def test_a_matrix_in_parts_is_the_matrix(dtype: str, outputs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = random(5, 72), random(outputs, 72, seed=2), random(outputs, seed=3)
    monkeypatch.setattr(forms, "FEW_WEIGHTS", 0)
    whole = [pack(weight, given, dtype) for given in (None, bias)]
    monkeypatch.setattr(forms, "PART", 192 * 72)
    parts = [pack(weight, given, dtype) for given in (None, bias)]
    assert isinstance(parts[0], StackedMatrix) is (outputs > 192)
    for a, b in zip(whole, parts, strict=True):
        assert torch.equal(a(x), b(x))
        assert b.nbytes <= most_bytes(72, outputs, dtype)


@pytest.mark.parametrize("dtype", ["packed16", "int8"])
def test_of_a_large_matrix_no_more_than_a_part_is_staged(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs = 3 * 2**16
    monkeypatch.setattr(forms, "PART", outputs)
    staged = forms.staged_bytes(outputs, 64, dtype)
    assert staged == forms.staged_bytes(outputs // 64, 64, dtype)
    read: list[int] = []

    class Rows:
        shape = (outputs, 64)

        def __getitem__(self, rows: slice) -> Tensor:
            start, stop, _ = rows.indices(self.shape[0])
            read.append(stop - start)
            return torch.ones(stop - start, 64)

    pack(Rows(), None, dtype)
    assert sum(read) == outputs
    assert max(read) * 64 <= forms.PART


# --- bytes and choices ----------------------------------------------------------------------------

SIZES = [(1, 1), (64, 1), (72, 50), (63, 33), (65, 49), (576, 960), (576, 1536), (1536, 576), (4864, 896)]


@needs_onednn
@pytest.mark.parametrize(("inputs", "outputs"), [*SIZES, (576, 49152)])
def test_a_matrix_of_onednn_takes_what_was_foretold(inputs: int, outputs: int) -> None:
    """Its packed tensor, its scales (fp32) and its zero points (int64)."""
    kernel = OneDnn()
    packed, scale, zero = kernel.pack(torch.ones(outputs, inputs, dtype=torch.int8), torch.ones(outputs))
    taken = torch.ops.mkldnn._nbytes(packed) + scale.nbytes + zero.nbytes
    assert taken <= kernel.nbytes(inputs, outputs) <= 1.1 * taken + 1024


class Heap(ctypes.Structure):
    """What `mallinfo2` tells; `mapped` and `used` are bytes that somebody has."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "free_chunks", "fast_chunks", "mappings", "mapped")),
        *((name, ctypes.c_size_t) for name in ("unused", "fast", "used", "free", "trimmable")),
    ]


@needs_fbgemm
@pytest.mark.parametrize(("inputs", "outputs"), [(576, 9600), (512, 9601), (513, 4817), (1536, 2048)])
def test_a_matrix_of_fbgemm_takes_what_was_foretold(inputs: int, outputs: int) -> None:
    """It says nothing of its memory, the C library's heap does."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallinfo2"):
        pytest.skip("this C library does not tell")
    libc.mallinfo2.restype = Heap
    kernel, weight = Fbgemm(63), torch.ones(outputs, inputs, dtype=torch.int8)

    def used() -> int:
        gc.collect()
        heap = libc.mallinfo2()
        return heap.used + heap.mapped

    kernel.pack(weight, torch.ones(outputs))
    before = used()
    packed = kernel.pack(weight, torch.ones(outputs))
    taken = used() - before
    assert 0.99 * taken <= kernel.nbytes(inputs, outputs) <= 1.1 * taken
    del packed


@each_kernel
@each_form
def test_a_matrix_knows_its_bytes(kernel: IntegerKernel, planes: int) -> None:
    assert IntegerMatrix(random(50, 72), None, planes, kernel).nbytes == kernel.nbytes(72, planes * 50)
    assert HalfMatrix(random(50, 72), None).nbytes == packed_bytes(72, 50)


@pytest.mark.parametrize("dtype", ["packed16", "int8"])
@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_whatever_a_cpu_takes_it_takes_no_more_than_planned(inputs: int, outputs: int, dtype: str) -> None:
    matrix = pack(random(outputs, inputs), None, dtype)
    assert matrix.nbytes <= most_bytes(inputs, outputs, dtype)


MULTIPLY = """
import torch
from cortex.neuron.nn.matrix import IntegerMatrix, integer_kernel
IntegerMatrix(torch.ones(64, 64), None, 1, integer_kernel())(torch.ones(3, 64))
"""


@needs_onednn
def test_the_chosen_kernel_is_none_of_onednns_reference_code() -> None:
    """Which gives the same numbers, a thousand times later."""
    environment = dict(os.environ, ONEDNN_VERBOSE="1")
    command = [sys.executable, "-c", MULTIPLY]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=15)
    products = [line for line in run.stdout.splitlines() if ",exec,cpu,matmul," in line]
    assert bool(products) is forms.has_matrix_unit()
    assert not [line for line in products if "ref" in line.split(",")[6]]


@needs_fbgemm
@pytest.mark.parametrize("most", [pytest.param(127, marks=needs_vnni), 63])
def test_the_largest_numbers_do_not_overflow_fbgemms_sums(most: int) -> None:
    """Without VNNI its kernels add two products in 16 bits, and stop at the largest."""
    kernel = Fbgemm(most)
    packed = kernel.pack(torch.full((64, 512), 127, dtype=torch.int8), torch.ones(64))
    for rows in (1, 2, 30):
        for sign in (1.0, -1.0):
            found = kernel.multiply(torch.full((rows, 512), sign * most), packed)
            assert torch.equal(found, torch.full((rows, 64), sign * most * 127 * 512))


@pytest.mark.skipif("onednn" not in ENGINES, reason="this build of torch lacks oneDNN")
@pytest.mark.parametrize(
    ("vnni", "amx", "allowed", "expected"),
    [
        (True, True, True, {"packed16": (2, 256), "int8": (1, 256)}),
        (True, True, False, {"packed16": None, "int8": (1, 254)}),
        (True, False, False, {"packed16": None, "int8": (1, 254)}),
        (False, False, False, {"packed16": None, "int8": (1, 126)}),
    ],
)
def test_the_form_follows_from_what_the_cpu_has(
    vnni: bool,
    amx: bool,
    allowed: bool,
    expected: dict[str, tuple[int, int] | None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: vnni)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: allowed)
    monkeypatch.setattr(forms, "IntegerMatrix", lambda w, b, planes, kernel: (planes, kernel.base))
    monkeypatch.setattr(forms, "HalfMatrix", lambda w, b: None)
    few, many = torch.empty(1, forms.FEW_WEIGHTS), torch.empty(1, forms.FEW_WEIGHTS + 1)
    forms.integer_kernel.cache_clear()
    forms.has_matrix_unit.cache_clear()
    try:
        made = [pack(many, None, dtype) for dtype in expected]
        small = [pack(few, None, dtype) for dtype in expected]
    finally:
        forms.integer_kernel.cache_clear()
        forms.has_matrix_unit.cache_clear()
    assert made == list(expected.values())
    assert small == [None, expected["int8"]]


def test_what_is_staged_follows_from_the_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 where fp16 is packed from it, planes of bytes else, twice for FBGEMM."""
    large = 2 * forms.FEW_WEIGHTS
    for kernel, copies in ((OneDnn(), 1), (Fbgemm(63), 2)):
        monkeypatch.setattr(forms, "integer_kernel", lambda kernel=kernel: kernel)
        for unit, sixteen in ((True, 2 * copies), (False, 4)):
            monkeypatch.setattr(forms, "has_matrix_unit", lambda unit=unit: unit)
            assert forms.staged_bytes(large, 1, "int8") == copies * large
            assert forms.staged_bytes(large, 1, "packed16") == sixteen * large
            assert forms.staged_bytes(8, 8, "packed16") == 4 * 64
