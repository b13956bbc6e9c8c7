"""Rotary position embedding on interleaved pairs, as one complex product.

Angles are fp32 position times fp32 inverse frequency, the arithmetic of `transformers`: exact
angles would differ from it visibly at long contexts. Knows nothing of layers or heads' meaning.
Formula: Su et al. 2021, section 3.2.2.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def inverse_frequencies(width: int, theta: float) -> Tensor:
    """theta^(-2i/width) for the width/2 pairs of a head, fp32."""
    return 1.0 / _powers(width, theta)


def _powers(width: int, theta: float) -> Tensor:
    exponents = torch.arange(0, width, 2, dtype=torch.int64).to(torch.float32) / width
    powers: Tensor = theta**exponents
    return powers


def llama3_scaled(
    frequencies: Tensor, factor: float, low_factor: float, high_factor: float, original_context: int
) -> Tensor:
    """Llama 3.1's stretching: long waves divided by `factor`, short ones kept, a ramp between.

    Reference: `_compute_llama3_parameters` in transformers' modeling_rope_utils.py.
    """
    wavelengths = 2 * math.pi / frequencies
    stretched = torch.where(wavelengths > original_context / low_factor, frequencies / factor, frequencies)
    smooth = (original_context / wavelengths - low_factor) / (high_factor - low_factor)
    ramp = (1 - smooth) * stretched / factor + smooth * stretched
    is_long = wavelengths > original_context / low_factor
    is_short = wavelengths < original_context / high_factor
    return torch.where(~is_short & ~is_long, ramp, stretched)


def yarn_frequencies(
    width: int, theta: float, factor: float, original_context: int, fast: float, slow: float, truncate: bool
) -> Tensor:
    """YaRN's stretching: pairs that turn less than `slow` times in the original context are stretched by
    `factor`, those that turn more than `fast` times are kept, with a ramp over the pairs between.

    Reference: section 3.2 of Peng et al. 2023, and `_compute_yarn_parameters` in transformers'
    modeling_rope_utils.py, whose order of operations and whose bounds this has.
    """

    def pair(turns: float) -> float:
        """Which pair turns so many times, counted with fractions and also outside of the head."""
        return width * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first, last = pair(fast), pair(slow)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    ramp = (torch.arange(width // 2, dtype=torch.float32) - first) / (last - first)
    kept = 1 - ramp.clamp(0, 1)
    powers = _powers(width, theta)
    return 1.0 / (factor * powers) * (1 - kept) + 1.0 / powers * kept


def rotations(positions: Tensor, frequencies: Tensor, attention: float = 1.0) -> Tensor:
    """`attention` * exp(i * angle) of each position and pair: complex64 [T, 1, width/2]."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    cos, sin = angles.cos(), angles.sin()
    if attention != 1.0:
        cos, sin = cos.mul_(attention), sin.mul_(attention)
    return torch.complex(cos, sin).unsqueeze(1)


def rotate_(heads: Tensor, rotation: Tensor) -> None:
    """Turn `heads`, fp32 [T, heads, width] with neighbours as pairs, in place by `rotations`.

    These may be fewer than width/2: what is left of a head stays as it is, unscaled too.
    """
    rows, count, width = heads.shape
    pairs = rotation.shape[-1]
    if 2 * pairs < width:
        heads = heads.narrow(-1, 0, 2 * pairs)
    torch.view_as_complex(heads.view(rows, count, pairs, 2)).mul_(rotation)
