"""Chooses the next token of each row from its logits. Pure: chance comes in as numbers.

A row's result depends on its own logits, settings and number only, never on its batch mates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from cortex.hookspecs import Sampling

CANDIDATES: Final = (256, 4096)
"""How many of the likeliest tokens are looked at before a whole vocabulary is sorted."""


@torch.inference_mode()
def sample(logits: Tensor, settings: Sequence[Sampling], draws: Sequence[float]) -> list[int | None]:
    """A token for each row of `logits`, fp32 [B, vocab]; None for a row with NaN or without a maximum.

    `draws` are numbers in [0, 1). Temperature 0 takes the likeliest token; otherwise temperature,
    top_k, top_p and min_p apply in this order, as in transformers.
    """
    highest, tokens = logits.max(dim=-1)
    groups: dict[bool, list[int]] = {}
    for row, setting in enumerate(settings):
        if setting.temperature > 0:
            groups.setdefault(setting.top_k > 0 or setting.top_p < 1, []).append(row)
    for truncates, rows in groups.items():
        at = torch.tensor(rows, device=logits.device)
        chosen = [settings[row] for row in rows]
        scale = _column([setting.temperature for setting in chosen], logits)
        # The maximum is subtracted first, so that no temperature is small enough to overflow.
        probabilities = torch.softmax((logits[at] - highest[at].unsqueeze(1)) / scale, dim=-1)
        uniform = _column([draws[row] for row in rows], logits, torch.float64)
        draw = _draw_truncated if truncates else _draw_whole
        tokens[at] = draw(probabilities, chosen, uniform)
    valid = torch.isfinite(highest).tolist()
    return [token if ok else None for token, ok in zip(tokens.tolist(), valid, strict=True)]


def _draw_whole(probabilities: Tensor, settings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Tokens of rows without top_k and top_p: nothing needs sorting."""
    least = _column([min(setting.min_p, 1.0) for setting in settings], probabilities)
    floor = least * probabilities.amax(dim=-1, keepdim=True)
    return _invert(probabilities.where(probabilities >= floor, 0.0), uniform)


def _draw_truncated(probabilities: Tensor, settings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Tokens of rows with top_k or top_p: each from the fewest candidates that are provably enough."""
    vocab = probabilities.shape[-1]
    tokens = torch.empty(len(settings), dtype=torch.int64, device=probabilities.device)
    left = list(range(len(settings)))
    for width in (*(few for few in CANDIDATES if few < vocab), vocab):
        likeliest, ids = probabilities[left].topk(width, dim=-1)
        covered = likeliest.sum(dim=-1).tolist()
        enough = [_enough(settings[row], width, total) for row, total in zip(left, covered, strict=True)]
        ready = [i for i, found in enumerate(enough) if found or width == vocab]
        if ready:
            rows = [left[i] for i in ready]
            rank = _draw_sorted(likeliest[ready], [settings[row] for row in rows], uniform[rows])
            tokens[rows] = ids[ready].gather(1, rank.unsqueeze(1)).squeeze(1)
            left = [row for row in left if row not in rows]
        if not left:
            break
    return tokens


def _enough(setting: Sampling, width: int, covered: float) -> bool:
    """True if no token outside the `width` likeliest, whose probabilities sum to `covered`, may come."""
    return setting.top_k <= width if setting.top_k > 0 else covered >= setting.top_p


def _draw_sorted(probabilities: Tensor, settings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Ranks in rows that are sorted from likeliest down."""
    width = probabilities.shape[-1]
    top_k = _column([setting.top_k if setting.top_k > 0 else width for setting in settings], probabilities)
    top_p = _column([setting.top_p for setting in settings], probabilities, torch.float64)
    min_p = _column([min(setting.min_p, 1.0) for setting in settings], probabilities)
    ranks = torch.arange(width, device=probabilities.device)
    kept = probabilities.where(ranks < top_k, 0.0)
    # top_p is a share of what top_k left, which without top_k is everything.
    share = kept.sum(dim=-1, keepdim=True, dtype=torch.float64)
    share = share.where(_column([setting.top_k for setting in settings], share) > 0, 1.0)
    kept = kept.where(kept >= min_p * probabilities[:, :1], 0.0)
    before = torch.cumsum(kept, dim=-1, dtype=torch.float64) - kept
    kept = kept.where((before < top_p * share) | (ranks == 0), 0.0)
    return _invert(kept, uniform)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The index at which the running sum of `weights` [B, n] passes `uniform` [B, 1] of their total."""
    sums = torch.cumsum(weights, dim=-1, dtype=torch.float64)
    total = sums[:, -1:]
    target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
    found = torch.searchsorted(sums, target, right=True).squeeze(1)
    return found.clamp_(max=weights.shape[-1] - 1)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=like.device).unsqueeze(1)
