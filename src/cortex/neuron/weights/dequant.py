"""Stored blocks to fp32: plain floats, those of 8 bits, and of GGUF's quants Q4_0 to Q8_0, Q2_K to Q6_K, and
those whose four bits choose from a list of sixteen values: IQ4_NL, IQ4_XS and MXFP4.

Bit-equal to ggml's reference (`dequantize_row_*` in ggml-quants.c): every value is a product of
exact factors that is rounded once, so the order of operations is free but the factors are not. Scales that
lie in a tensor of their own are multiplied in afterwards. Knows nothing of files or tensors' meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from cortex.neuron.weights.layout import BLOCKS


def dequantize(raw: Tensor, dtype: str) -> Tensor:
    """fp32 [rows, columns] from `raw`, uint8 [rows, bytes of a row], in whole blocks of `dtype`.

    Raises KeyError for a dtype outside `layout.READABLE`.
    """
    read = _READERS[dtype]
    per_block, block_bytes = BLOCKS[dtype]
    rows, row_bytes = raw.shape
    blocks = raw.reshape(-1, block_bytes)
    return read(blocks).reshape(rows, row_bytes // block_bytes * per_block)


def scale_blocks(numbers: Tensor, scales: Tensor, width: int, skipped: int) -> None:
    """Multiply fp32 [rows, columns] in place by [rows or 1, blocks]: each scale is for `width` columns, but
    the first one for fewer by those that are `skipped`, and the last one for what is left."""
    columns = numbers.shape[1]
    first = min(width - skipped, columns) if skipped else 0
    if first:
        numbers[:, :first].mul_(scales[:, :1])
        scales = scales[:, 1:]
    count = (columns - first) // width
    last = first + count * width
    if count:
        numbers[:, first:last].view(-1, count, width).mul_(scales[:, :count].unsqueeze(-1))
    if last < columns:
        numbers[:, last:].mul_(scales[:, count:])


def _plain(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda blocks: _aligned(blocks, dtype.itemsize).view(dtype).to(torch.float32)


def _aligned(blocks: Tensor, size: int) -> Tensor:
    """safetensors does not align its tensors; a view of another type needs it."""
    return blocks if blocks.data_ptr() % size == 0 else blocks.clone()


_HALF_BITS: Final = -0x4001
"""Of a half float, all bits but the highest one of the exponent."""


def _e4m3(blocks: Tensor) -> Tensor:
    """Its bits put into a half float, between sign and exponent a zero, are the number divided by 2^8; so it
    is below the normal numbers too. torch's own conversion takes ten times as long."""
    if blocks.numel() and int((blocks << 1).max()) == 254:  # there is a NaN, which would become a number
        return blocks.view(torch.float8_e4m3fn).to(torch.float32)
    halves = blocks.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(_HALF_BITS)
    return halves.view(torch.float16).to(torch.float32).mul_(256)


def _half(blocks: Tensor, at: int) -> Tensor:
    """The fp16 number at byte `at` of each block, fp32 [blocks, 1]."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).to(torch.float32)


_ONES: Final = 0x0101010101010101
"""A one in each of eight bytes, which are worked on as one int64: a run of a block's bytes is too short to be
worked on fast byte by byte. What a shift brings over from the neighbour is masked out."""


def _eights(packed: Tensor) -> Tensor:
    """int64 [blocks, bytes / 8]. Copied, as a block that is alone need not lie where such numbers may."""
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int64)


def _nibbles(packed: Tensor, group: int) -> Tensor:
    """Low then high halves of each run of `group` bytes: uint8 [blocks, runs, 2, group]."""
    runs = _eights(packed).view(packed.shape[0], -1, group // 8)
    return torch.stack((runs & 15 * _ONES, (runs >> 4) & 15 * _ONES), dim=2).view(torch.uint8)


def _crumbs(packed: Tensor, group: int) -> Tensor:
    """The four two-bit fields of each run of `group` bytes: uint8 [blocks, runs, 4, group]."""
    runs = packed.reshape(packed.shape[0], -1, group)
    return torch.stack((runs & 3, (runs >> 2) & 3, (runs >> 4) & 3, runs >> 6), dim=2)


_SHIFTS: Final = torch.arange(8).view(8, 1)


def _bits(packed: Tensor) -> Tensor:
    """The lowest bits of all bytes, then the next ones: uint8 [blocks, 8, bytes]."""
    return ((_eights(packed).unsqueeze(1) >> _SHIFTS) & _ONES).view(torch.uint8)


_FIFTHS: Final = (
    (torch.arange(256).view(-1, 1) >> torch.arange(8) & 1).mul(16).byte().view(torch.int64).view(-1)
)
"""For each value of a byte eight bytes: 16 where a bit is set, the lowest one first."""


def _q4_0(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 2:18], 16).reshape(-1, 32).to(torch.float32)
    return q.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    q = _nibbles(blocks[:, 4:20], 16).reshape(-1, 32).to(torch.float32)
    return q.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _five_bits(low: Tensor, high: Tensor) -> Tensor:
    """Five-bit numbers of 32-element blocks from 16 bytes of nibbles and 4 bytes of fifth bits."""
    fifths = _FIFTHS.index_select(0, high.reshape(-1).to(torch.int32))
    return (_nibbles(low, 16).view(-1, 32) | fifths.view(torch.uint8).view(-1, 32)).to(torch.float32)


def _q5_0(blocks: Tensor) -> Tensor:
    return _five_bits(blocks[:, 6:22], blocks[:, 2:6]).sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    q = _five_bits(blocks[:, 8:24], blocks[:, 4:8])
    return q.mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:34].view(torch.int8).to(torch.float32).mul_(_half(blocks, 0))


def _q2_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 0:16]
    scale = (_half(blocks, 80) * (scales & 0x0F)).unsqueeze(-1)
    minimum = (_half(blocks, 82) * (scales >> 4)).unsqueeze(-1)
    q = _crumbs(blocks[:, 16:80], 32).reshape(-1, 16, 16).to(torch.float32)
    return q.mul_(scale).sub_(minimum)


def _q3_k(blocks: Tensor) -> Tensor:
    packed = blocks[:, 96:108]
    low = _nibbles(packed[:, :8], 8).reshape(-1, 16)
    high = _crumbs(packed[:, 8:], 4).reshape(-1, 16)
    scale = (low | (high << 4)).to(torch.float32).sub_(32).mul_(_half(blocks, 108)).unsqueeze(-1)
    # A set mask bit means "no offset"; bit b of the 32 mask bytes belongs to the b-th run of 32 numbers.
    offset = _bits(blocks[:, 0:32]).view(-1, 16, 16).to(torch.float32).sub_(1).mul_(4)
    q = _crumbs(blocks[:, 32:96], 32).reshape(-1, 16, 16).to(torch.float32)
    return q.add_(offset).mul_(scale)


def _scales_and_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Of Q4_K and Q5_K: d * scale and dmin * minimum, each fp32 [blocks, 8, 1].

    Of twelve bytes, four hold the low six bits of scales 0-3 and four those of minima 0-3; the last
    four hold low nibbles of scales and minima 4-7, whose top two bits are over the former ones.
    """
    scales, minima, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = torch.cat((scales & 0x3F, (rest & 0x0F) | ((scales >> 2) & 0x30)), dim=1)
    minimum = torch.cat((minima & 0x3F, (rest >> 4) | ((minima >> 2) & 0x30)), dim=1)
    return (_half(blocks, 0) * scale).unsqueeze(-1), (_half(blocks, 2) * minimum).unsqueeze(-1)


def _q4_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    q = _nibbles(blocks[:, 16:144], 32).reshape(-1, 8, 32).to(torch.float32)
    return q.mul_(scale).sub_(minimum)


def _q5_k(blocks: Tensor) -> Tensor:
    scale, minimum = _scales_and_minima(blocks)
    fifth = _bits(blocks[:, 16:48]) << 4
    q = (_nibbles(blocks[:, 48:176], 32).reshape(-1, 8, 32) | fifth).to(torch.float32)
    return q.mul_(scale).sub_(minimum)


def _q6_k(blocks: Tensor) -> Tensor:
    scale = (blocks[:, 192:208].view(torch.int8) * _half(blocks, 208)).unsqueeze(-1)
    high = _crumbs(blocks[:, 128:192], 32).reshape(-1, 256) << 4
    q = (_nibbles(blocks[:, 0:128], 64).reshape(-1, 256) | high).to(torch.float32).sub_(32)
    return q.view(-1, 16, 16).mul_(scale)


def _pairs(values: tuple[int, ...]) -> Tensor:
    """What each two codes in neighbouring bytes stand for, the lower byte first: two fp32 in an int64.

    Made without torch's threads: this runs at import, in the process that workers are forked from.
    """
    both = [float(values[code & 15]) for codes in range(0x0F0F + 1) for code in (codes, codes >> 8)]
    return torch.tensor(both).view(torch.int64)


_IQ4: Final = _pairs((-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113))
_E2M1: Final = _pairs((0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12))
"""Twice what sign, two bits of exponent and one of mantissa say; the scale is half of what is stored."""
_EXPONENTS: Final = torch.arange(256, dtype=torch.int32)
_HALF_POWERS: Final = torch.where(
    _EXPONENTS < 2, 2**21 << _EXPONENTS.clamp(max=1), (_EXPONENTS - 1) << 23
).view(torch.float32)
"""2 to the power of each byte less 128, made of bits: the two smallest ones are subnormal."""


def _chosen(packed: Tensor, pairs: Tensor) -> Tensor:
    """What four-bit codes in runs of 16 bytes stand for, two at a look: fp32 [blocks, runs, 32]."""
    codes = _nibbles(packed, 16).view(torch.int16)
    values = pairs.index_select(0, codes.view(-1).to(torch.int32))
    return values.view(torch.float32).view(packed.shape[0], -1, 32)


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _chosen(blocks[:, 2:18], _IQ4).mul_(_half(blocks, 0).unsqueeze(-1))


def _iq4_xs(blocks: Tensor) -> Tensor:
    packed = blocks[:, 4:8]
    low = torch.stack((packed & 15, packed >> 4), dim=2).view(-1, 8)
    high = _crumbs(blocks[:, 2:4], 1).view(-1, 8)
    scale = (low | (high << 4)).to(torch.float32).sub_(32).mul_(_half(blocks, 0)).unsqueeze(-1)
    return _chosen(blocks[:, 8:136], _IQ4).mul_(scale)


def _mxfp4(blocks: Tensor) -> Tensor:
    scale = _HALF_POWERS.index_select(0, blocks[:, 0].to(torch.int32)).view(-1, 1, 1)
    return _chosen(blocks[:, 1:17], _E2M1).mul_(scale)


_READERS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "F8_E4M3": _e4m3,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "MXFP4": _mxfp4,
}
