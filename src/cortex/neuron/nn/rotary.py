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
    exponents = torch.arange(0, width, 2, dtype=torch.int64).to(torch.float32) / width
    return 1.0 / (theta**exponents)


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


def rotations(positions: Tensor, frequencies: Tensor) -> Tensor:
    """exp(i * angle) of each position and pair: complex64 [T, 1, width/2]."""
    angles = positions.to(torch.float32).unsqueeze(-1) * frequencies
    return torch.complex(angles.cos(), angles.sin()).unsqueeze(1)


def rotate_(heads: Tensor, rotation: Tensor) -> None:
    """Turn `heads`, fp32 [T, heads, width] with neighbours as pairs, in place by `rotations`.

    These may be fewer than width/2: what is left of a head stays as it is.
    """
    rows, count, width = heads.shape
    pairs = rotation.shape[-1]
    if 2 * pairs < width:
        heads = heads.narrow(-1, 0, 2 * pairs)
    torch.view_as_complex(heads.view(rows, count, pairs, 2)).mul_(rotation)
