from __future__ import annotations

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize as reference

from cortex.neuron.weights.dequant import dequantize
from cortex.neuron.weights.layout import BLOCKS, FP8, READABLE

PLAIN = {"F32": numpy.float32, "F16": numpy.float16}


@pytest.mark.parametrize("dtype", [dtype for dtype in READABLE if dtype != FP8])
def test_numbers_are_bit_equal_to_ggufs_own(dtype: str) -> None:
    """Random bytes, so many that every quant and every scale of one byte occurs, and infinities and NaN."""
    per_block, block_bytes = BLOCKS[dtype]
    row_blocks = 5 if per_block > 1 else 160
    raw = numpy.random.default_rng(7).integers(0, 256, (999, row_blocks * block_bytes), dtype=numpy.uint8)
    with numpy.errstate(all="ignore"):
        stored = raw.view(PLAIN[dtype]) if dtype in PLAIN else raw
        expected = reference(stored, GGMLQuantizationType[dtype])
    found = dequantize(torch.from_numpy(raw), dtype).numpy()
    assert found.dtype == numpy.float32
    assert found.shape == (999, row_blocks * per_block)
    assert numpy.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("leave_out", [[], [0x7F, 0xFF]], ids=["all", "without-nan"])
def test_every_8_bit_float_is_what_torch_says(leave_out: list[int]) -> None:
    raw = torch.tensor([byte for byte in range(256) if byte not in leave_out], dtype=torch.uint8)
    found, expected = dequantize(raw.view(2, -1), FP8).view(-1), raw.view(torch.float8_e4m3fn).float()
    assert int(found.isnan().sum()) == 2 - len(leave_out)
    assert torch.equal(found.nan_to_num().view(torch.int32), expected.nan_to_num().view(torch.int32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_numbers_at_odd_addresses_are_read(dtype: str) -> None:
    size = BLOCKS[dtype][1]
    raw = torch.arange(1 + 8 * size, dtype=torch.uint8)
    assert torch.equal(
        dequantize(raw[1:].view(2, 4 * size), dtype), dequantize(raw[1:].clone().view(2, 4 * size), dtype)
    )


@pytest.mark.parametrize("dtype", READABLE)
def test_a_block_that_is_read_alone_is_what_it_is_among_others(dtype: str) -> None:
    """Wherever it begins: a load's last piece may be one block."""
    per_block, block_bytes = BLOCKS[dtype]
    raw = torch.from_numpy(numpy.random.default_rng(3).integers(0, 60, (9, block_bytes), dtype=numpy.uint8))
    together = dequantize(raw, dtype)
    for row in range(9):
        alone = dequantize(raw[row : row + 1], dtype)
        assert alone.shape == (1, per_block)
        assert torch.equal(alone.view(torch.int32), together[row : row + 1].view(torch.int32))
