"""The gated delta rule over per-sequence states: one token of many sequences, or a span of one.

Of each value head the state S, [key width, value width], is a memory of values by key (Yang, Kautz and
Hatamizadeh 2024, "Gated Delta Networks"): S ← e^g S; S ← S + k (β (v - Sᵀk))ᵀ; o = Sᵀq. Pure functions of
tensors, fp32 throughout, of any device; keys and queries are brought to length 1 here. Knows no layer.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK: Final = 64
"""Tokens that the chunked form takes together."""

FORGOTTEN: Final = -40.0
"""The logarithm of a decay that leaves nothing. Such numbers are made 0 before their products come to those
so small that CPUs compute with them many times slower."""
NOTHING: Final = 1e-18


class Heads(NamedTuple):
    """`groups` value heads share each of `keys` key heads: value head v has the key head v // groups, or,
    where they are `tiled` as in GGUF files, v mod keys.
    """

    keys: int
    groups: int
    tiled: bool

    def times(self, of_keys: Tensor, of_values: Tensor) -> Tensor:
        """[N, keys, …] by [N, keys * groups, …], each value head by its key head: [N, keys * groups, …]."""
        if self.groups == 1:
            return of_keys * of_values
        parts = (self.groups, self.keys) if self.tiled else (self.keys, self.groups)
        product = of_keys.unsqueeze(1 if self.tiled else 2) * torch.unflatten(of_values, 1, parts)
        return product.flatten(1, 2)

    def spread(self, of_keys: Tensor) -> Tensor:
        """[N, keys, …] -> [N, keys * groups, …], for each value head its key head's."""
        if self.groups == 1:
            return of_keys
        rows, keys, *rest = of_keys.shape
        if self.tiled:
            wide = of_keys.unsqueeze(1).expand(rows, self.groups, keys, *rest)
        else:
            wide = of_keys.unsqueeze(2).expand(rows, keys, self.groups, *rest)
        return wide.flatten(1, 2)


def recur(
    heads: Heads,
    queries_keys: Tensor,
    values: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    memory: Tensor,
    slots: Tensor,
) -> Tensor:
    """One token of each of n sequences: queries and keys [n, 2, keys, key width], values [n, heads, value
    width], beta and log_decay [n, heads] -> [n, heads, value width].

    The states are memory[slots], fp32 [slots, heads, key width, value width], and change in place. A state
    is read once, with query and key together: with the new value u = β (v - e^g Sᵀk), o = e^g Sᵀq + (k·q) u.
    """
    rows, count, _ = values.shape
    asked = heads.spread(unit_length(queries_keys).transpose(1, 2)).reshape(rows, count, 2, -1)
    overlap = torch.linalg.vecdot(asked.select(2, 0), asked.select(2, 1)).unsqueeze(-1)
    given = (asked, overlap, values, beta.unsqueeze(-1), _exp(log_decay).view(rows, count, 1, 1))
    if memory.device.type == "cpu":
        # Sequence by sequence, as a state fits the caches, and all of them do not.
        places = slots.tolist()
        of_rows = zip(places, *(part.unbind() for part in given), strict=True)
        return torch.stack([_update(memory[place], *row) for place, *row in of_rows])
    states = memory.index_select(0, slots)
    found = _update(states, *given)
    memory.index_copy_(0, slots, states)
    return found


def _update(
    state: Tensor, asked: Tensor, overlap: Tensor, values: Tensor, beta: Tensor, decay: Tensor
) -> Tensor:
    """[…, heads, value width] from the state […, heads, key width, value width], which it changes."""
    found = torch.matmul(asked, state).mul_(decay)
    fresh = (values - found.select(-2, 1)).mul_(beta)
    state.mul_(decay).addcmul_(asked.select(-2, 1).unsqueeze(-1), fresh.unsqueeze(-2))
    return torch.addcmul(found.select(-2, 0), overlap, fresh)


def scan(
    heads: Heads, queries_keys: Tensor, values: Tensor, beta: Tensor, log_decay: Tensor, state: Tensor
) -> Tensor:
    """A span of T tokens of one sequence, in chunks: queries and keys [T, 2, keys, key width], values [T,
    heads, value width], beta and log_decay [T, heads] -> [T, heads, value width]. `state`, fp32 [heads, key
    width, value width], changes in place.

    With G the sum of log decays from the chunk's start on, D_ij = e^(G_i - G_j) for i >= j, and A_ij =
    β_i D_ij k_i·k_j for i > j, the new values of a chunk are U = (I + A)⁻¹ diag(β) (V - e^G K S), of which
    all but the product with S is computed for all chunks at once. Then O = e^G Q S + (D ∘ Q Kᵀ) U, and the
    next chunk's S is e^(G_C) S + Kᵀ (e^(G_C - G) U) (section 3.3 of the paper).
    """
    rows, count, width = values.shape
    chunks = -(-rows // CHUNK)
    size = -(-rows // chunks)
    missing = chunks * size - rows
    if missing:  # tokens that change nothing: k = v = β = 0, no decay
        queries_keys = F.pad(queries_keys, (0, 0, 0, 0, 0, 0, 0, missing))
        values = F.pad(values, (0, 0, 0, 0, 0, missing))
        beta, log_decay = F.pad(beta, (0, 0, 0, missing)), F.pad(log_decay, (0, 0, 0, missing))
    beta, log_decay = (x.reshape(chunks, size, count).transpose(1, 2) for x in (beta, log_decay))
    units = queries_keys.reshape(chunks, size, 2, heads.keys, -1)
    units = unit_length(units.permute(0, 3, 2, 1, 4)).view(chunks, heads.keys, 2 * size, -1)

    total = log_decay.cumsum(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu_(1)
    # Masked before the exponential, which would overflow there.
    between = _exp((total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(later, float("-inf")))
    products = torch.matmul(units, units.narrow(2, size, size).transpose(-1, -2))
    scores, alike = (heads.times(part, between) for part in torch.split(products, size, 2))
    inverse = torch.linalg.solve_triangular(
        alike.mul_(beta.unsqueeze(-1)), torch.diag_embed(beta), upper=False, unitriangular=True
    )
    inverse = F.hardshrink(inverse, NOTHING)
    since_start = _exp(total)
    until_end = _exp(total.narrow(-1, size - 1, 1) - total).unsqueeze(-1)
    decay = since_start.narrow(-1, size - 1, 1).unsqueeze(-1)
    since_start = torch.cat((since_start, since_start), -1).unsqueeze(-1)
    found = torch.empty_like(values, memory_format=torch.contiguous_format)
    in_chunks = [x.view(chunks, size, count, width).transpose(1, 2) for x in (values, found)]
    parts = (*in_chunks, heads.spread(units), inverse, scores, since_start, until_end, decay)
    for value, target, unit, invert, score, before, after, whole in zip(
        *(part.unbind() for part in parts), strict=True
    ):
        of_queries, of_keys = torch.split(torch.bmm(unit, state).mul_(before), size, 1)
        fresh = torch.bmm(invert, value - of_keys)
        torch.baddbmm(of_queries, score, fresh, out=target)
        state.mul_(whole).baddbmm_(unit.narrow(1, size, size).transpose(1, 2), fresh.mul_(after))
    return found.narrow(0, 0, rows)


def unit_length(x: Tensor) -> Tensor:
    """x / sqrt(sum(x²) + 1e-6) over the last dimension, contiguous."""
    squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().add_(1e-6)
    return torch.mul(x, squares.rsqrt_(), out=x.new_empty(x.shape))


def _exp(log_decays: Tensor) -> Tensor:
    """e^x, or 0 where that leaves nothing."""
    return F.threshold(log_decays, FORGOTTEN, float("-inf")).exp_()
