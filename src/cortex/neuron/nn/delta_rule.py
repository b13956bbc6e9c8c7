"""The gated delta rule over per-sequence states: one token of many sequences, or a span of one.

Of each value head the state S, [key width, value width], is a memory of values by key (Yang, Kautz and
Hatamizadeh 2024, "Gated Delta Networks"): S ← e^g S; S ← S + k (β (v - Sᵀk))ᵀ; o = Sᵀq. Pure functions of
tensors, fp32 throughout, of any device. Knows no layer; keys and queries come normalised.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK: Final = 64
"""Tokens that the chunked form takes together."""


class Heads(NamedTuple):
    """`groups` value heads share each of `keys` key heads: value head v has the key head v // groups, or,
    where they are `tiled` as in GGUF files, v mod keys.
    """

    keys: int
    groups: int
    tiled: bool

    def pair(self, of_keys: Tensor, of_values: Tensor) -> tuple[Tensor, Tensor]:
        """Views of [N, keys, …] and [N, keys * groups, …] whose product broadcasts to each value head its
        key head's: [N, …, …, …] both.
        """
        if self.tiled:
            return of_keys.unsqueeze(1), torch.unflatten(of_values, 1, (self.groups, self.keys))
        return of_keys.unsqueeze(2), torch.unflatten(of_values, 1, (self.keys, self.groups))

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

    The states are memory[slots], fp32 [slots, heads, key width, value width], and change in place. The state
    is read once, with key and query together: with the new value u = β (v - e^g Sᵀk), o = e^g Sᵀq + (k·q) u.
    """
    rows = values.shape[0]
    asked = heads.spread(queries_keys.transpose(1, 2))  # [n, heads, 2, key width]
    query, key = asked.unbind(2)
    decay = log_decay.exp().unsqueeze(-1)
    alone = values.device.type == "cpu"
    if alone:
        # A state fits the caches and all of them do not: sequence by sequence is the faster way.
        places = slots.tolist()
        states = [memory[place] for place in places]
        found = torch.stack([torch.bmm(asked[row], state) for row, state in enumerate(states)])
    else:
        gathered = memory.index_select(0, slots)
        found = torch.matmul(asked, gathered)
    found.mul_(decay.unsqueeze(-1))
    of_query, of_key = found.unbind(2)
    fresh = (values - of_key).mul_(beta.unsqueeze(-1))
    overlap = torch.linalg.vecdot(query, key).unsqueeze(-1)
    column, row_vector = key.unsqueeze(-1), fresh.unsqueeze(-2)
    decay = decay.unsqueeze(-1)
    if alone:
        for row in range(rows):
            states[row].mul_(decay[row]).addcmul_(column[row], row_vector[row])
    else:
        memory.index_copy_(0, slots, gathered.mul_(decay).addcmul_(column, row_vector))
    return torch.addcmul(of_query, overlap, fresh)


def scan(
    heads: Heads,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    state: Tensor,
) -> Tensor:
    """A span of T tokens of one sequence, in chunks: queries and keys [T, keys, key width], values [T, heads,
    value width], beta and log_decay [T, heads] -> [T, heads, value width]. `state`, fp32 [heads, key width,
    value width], changes in place.

    With G the sum of log decays from the chunk's start on, D_ij = e^(G_i - G_j) for i >= j, and A_ij =
    β_i D_ij k_i·k_j for i > j, the new values of a chunk are V = (I + A)⁻¹ β (v - e^G k S), of which all but
    the product with S is computed for all chunks at once. Then O = e^G q S + (D ∘ q kᵀ) V, and the next
    chunk's S is e^(G_C) S + (e^(G_C - G) k)ᵀ V (section 3.3 of the paper).
    """
    rows, width = values.shape[0], values.shape[2]
    chunks = -(-rows // CHUNK)
    size = -(-rows // chunks)
    missing = chunks * size - rows
    if missing:  # tokens that change nothing: k = v = β = 0, no decay
        queries, keys, values = (F.pad(x, (0, 0, 0, 0, 0, missing)) for x in (queries, keys, values))
        beta, log_decay = (F.pad(x, (0, 0, 0, missing)) for x in (beta, log_decay))
    queries, keys, values, beta, log_decay = (
        x.reshape(chunks, size, *x.shape[1:]).transpose(1, 2)
        for x in (queries, keys, values, beta, log_decay)
    )
    total = log_decay.cumsum(-1)
    later = torch.ones(size, size, dtype=torch.bool, device=total.device).triu_(1)
    # Masked before the exponential, which would overflow there.
    between = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill_(later, float("-inf")).exp_()
    keys_across = keys.transpose(-1, -2)
    alike, decays = heads.pair(keys @ keys_across, between)
    system = (alike * decays).flatten(1, 2).mul_(beta.unsqueeze(-1))
    alike, decays = heads.pair(queries @ keys_across, between)
    scores = (alike * decays).flatten(1, 2)

    since_start = total.exp()
    until_end = (total.narrow(-1, size - 1, 1) - total).exp()
    solved = torch.linalg.solve_triangular(
        system,
        torch.cat((values * beta.unsqueeze(-1), _scaled(heads, keys, beta * since_start)), -1),
        upper=False,
        unitriangular=True,
    )
    asked = torch.cat((solved.narrow(-1, width, keys.shape[-1]), _scaled(heads, queries, since_start)), 2)
    written = _scaled(heads, keys, until_end).transpose(-1, -2)
    decay = since_start.narrow(-1, size - 1, 1).unsqueeze(-1)
    found = torch.empty_like(values, memory_format=torch.contiguous_format)
    of_chunks = (
        part.unbind(0) for part in (asked, solved.narrow(-1, 0, width), scores, decay, written, found)
    )
    for question, new, score, factor, key, target in zip(*of_chunks, strict=True):
        read, outcome = torch.split(torch.bmm(question, state), size, 1)
        fresh = new - read
        torch.baddbmm(outcome, score, fresh, out=target)
        state.mul_(factor).baddbmm_(key, fresh)
    return found.transpose(1, 2).flatten(0, 1).narrow(0, 0, rows)


def _scaled(heads: Heads, of_keys: Tensor, factors: Tensor) -> Tensor:
    """[N, keys, C, width] by value head, times [N, heads, C]."""
    rows, factors = heads.pair(of_keys, factors.unsqueeze(-1))
    return (rows * factors).flatten(1, 2)
