"""Chance as a race among tokens: each runs for a random time that depends on the row's number and on its own
id alone, divided by its probability, and the first one wins.

That wins each token as often as its probability says (exponential races; their logarithm is the Gumbel-max
trick, Maddison et al. 2014). Logits that differ by a rounding change who wins only where two are as good as
level. A running sum of probabilities would hand the difference on to every token that comes later in it.
Knows neither logits nor settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from cortex.neuron.nn.transfer import to_device


def _signed(number: int) -> int:
    return number - 2**32 if number >= 2**31 else number


_STEP: Final = _signed(0x9E3779B9)
"""2^32 over the golden ratio: neighbouring ids come to lie far apart."""
_FIRST, _SECOND = _signed(0x85EBCA6B), _signed(0xC2B2AE35)
"""What murmur3's finaliser multiplies by (Appleby)."""
_BITS: Final = 31


def keys(chances: Sequence[int], device: torch.device) -> Tensor:
    """int32 [rows, 2] from numbers of 64 bits, one for each row."""
    halves = [[_signed(chance & 0xFFFFFFFF), _signed(chance >> 32 & 0xFFFFFFFF)] for chance in chances]
    return to_device(halves, device, torch.int32)


def winner(probabilities: Tensor, ids: Tensor, keys: Tensor) -> Tensor:
    """The places in rows of `probabilities`, fp32 [B, n], of the tokens that win: int64 [B]. `ids`, [n] or
    [B, n], are theirs.
    """
    return _times(ids, keys).div_(probabilities).argmin(dim=-1)


def _times(ids: Tensor, keys: Tensor) -> Tensor:
    """Exponentially distributed, fp32 [B, n]: of each row and id always the same."""
    first, second = keys.unsqueeze(-1).unbind(1)
    mixed = ids.to(torch.int32).mul(_STEP).add(first)
    mixed = mixed.bitwise_xor_(mixed >> 16).mul_(_FIRST).bitwise_xor_(second)
    mixed = mixed.bitwise_xor_(mixed >> 13).mul_(_SECOND)
    mixed = mixed.bitwise_xor_(mixed >> 16).bitwise_and_(2**_BITS - 1)
    # -log(1 - u): small times, by which rare tokens win, are told apart best.
    uniform = mixed.to(torch.float32).add_(0.5).mul_(-(2.0**-_BITS))
    return uniform.log1p_().neg_()
