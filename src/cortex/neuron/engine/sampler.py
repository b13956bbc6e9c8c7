"""Chooses the next token of each row from its logits, on the device where they are. Pure: chance comes in as
numbers.

A row's result depends on its own logits, settings and number only, never on its batch mates. Knows no
sequences: what penalties need comes as distinct ids and counts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from cortex.hookspecs import Sampling, TokenLogprobs
from cortex.neuron.engine.race import keys, winner
from cortex.neuron.nn.transfer import ToHost, to_device

CANDIDATES: Final = (256, 4096)
"""How many of the likeliest tokens are looked at before a whole vocabulary is sorted."""
LEAST_REPETITION: Final = 1e-20
"""Logits divided by less might be no numbers any more, which would count as the model's damage."""
_NONE: Final = -1


class Row(NamedTuple):
    """What a row of logits is to be sampled by. `chance` is a random number of 64 bits; `ids` are the
    distinct tokens of prompt and reply and `counts` how often the reply has them, both empty without
    penalties. `withhold` keeps stop ids from being chosen.
    """

    settings: Sampling
    chance: int
    ids: array[int]
    counts: array[float]
    withhold: bool = False


class Chosen:
    """A token for each row, on the device where the logits were; `read` brings them to the host."""

    def __init__(self, tokens: Tensor, valid: Tensor, told: _Told) -> None:
        self.tokens: Final = tokens
        """int64 [B]; of rows without a token, any."""
        self._told = told
        self._ids = ToHost(tokens.where(valid, _NONE))

    def read(self) -> list[tuple[int, TokenLogprobs | None] | None]:
        """Waits for them; None for a row with NaN or without a maximum."""
        return [
            None if token == _NONE else (token, told)
            for token, told in zip(self._ids.read(), self._told.read(), strict=True)
        ]


@torch.inference_mode()
def choose(logits: Tensor, rows: Sequence[Row], *, waits: bool = True) -> Chosen:
    """From each row of `logits`, fp32 [B, vocab], which are changed.

    Temperature 0 takes the likeliest token; otherwise temperature, top_k, top_p and min_p apply in this
    order, as in transformers. If nobody `waits`, the host reads nothing here, but for penalties.
    """
    device = logits.device
    told = _Told(logits, rows)
    _shift(logits, rows)
    highest, tokens = logits.max(dim=-1)
    valid = torch.isfinite(highest)
    groups: dict[bool, list[int]] = {}
    for index, row in enumerate(rows):
        setting = row.settings
        if setting.temperature > 0:
            groups.setdefault(setting.top_k > 0 or setting.top_p < 1, []).append(index)
    for truncates, indices in groups.items():
        everyone = len(indices) == len(rows)
        at = to_device(indices, device)
        chosen = [rows[index].settings for index in indices]
        scale = _column([setting.temperature for setting in chosen], logits)
        # The maximum is subtracted first, so that no temperature is small enough to overflow.
        own = logits if everyone else logits.index_select(0, at)
        shifted = own.sub_((highest if everyone else highest.index_select(0, at)).unsqueeze(1)).div_(scale)
        chances = keys([rows[index].chance for index in indices], device)
        probabilities = torch.softmax(shifted, dim=-1)
        if truncates:
            drawn = _draw_truncated(probabilities, chosen, chances, waits)
        else:
            drawn = _draw_whole(probabilities, chosen, chances)
        tokens.index_copy_(0, at, drawn)
    told.about(tokens)
    return Chosen(tokens, valid, told)


class _Told:
    """The log probabilities that rows ask for, of the logits as the model gave them."""

    def __init__(self, logits: Tensor, rows: Sequence[Row]) -> None:
        self._rows = len(rows)
        counts = {index: row.settings.logprobs for index, row in enumerate(rows)}
        self._counts = {index: count for index, count in counts.items() if count is not None}
        self._found: tuple[ToHost, ...] = ()
        if self._counts:
            self._at = to_device([*self._counts], logits.device)
            everyone = len(self._counts) == len(rows)
            asked = logits if everyone else logits.index_select(0, self._at)
            self._logprobs = torch.log_softmax(asked, dim=-1)

    def about(self, tokens: Tensor) -> None:
        """These were chosen: int64 [B]."""
        if self._counts:
            ids = tokens.index_select(0, self._at)
            most = min(max(self._counts.values()), self._logprobs.shape[1])
            own = self._logprobs.gather(1, ids.unsqueeze(1)).squeeze(1)
            found = (ids, own, *self._logprobs.topk(most, dim=-1))
            self._found = tuple(ToHost(numbers) for numbers in found)

    def read(self) -> list[TokenLogprobs | None]:
        """Of each row that asks."""
        told: list[TokenLogprobs | None] = [None] * self._rows
        numbers = zip(*(found.read() for found in self._found), strict=True)
        for (index, count), (id, own, values, others) in zip(self._counts.items(), numbers, strict=True):
            told[index] = TokenLogprobs(id, own, list(zip(others[:count], values[:count], strict=True)))
        return told


def _shift(logits: Tensor, rows: Sequence[Row]) -> None:
    """Bias, penalties and withheld stop ids, in place; all rows' in one pass over their own tokens."""
    vocab = logits.shape[-1]
    flat = logits.view(-1)
    biased = [
        (index * vocab + id, value)
        for index, row in enumerate(rows)
        for id, value in row.settings.logit_bias.items()
        if 0 <= id < vocab
    ]
    if biased:
        at = to_device([place for place, _ in biased], logits.device)
        flat.index_add_(0, at, to_device([value for _, value in biased], logits.device))
    penalised = [(index, row) for index, row in enumerate(rows) if row.ids]
    if penalised:
        _penalise(flat, vocab, penalised)
    withheld = [
        index * vocab + id
        for index, row in enumerate(rows)
        if row.withhold
        for id in row.settings.stop_ids
        if id < vocab
    ]
    if withheld:
        flat.index_fill_(0, to_device(withheld, logits.device), float("-inf"))


def _penalise(flat: Tensor, vocab: int, rows: Sequence[tuple[int, Row]]) -> None:
    """Repetition as in transformers (Keskar et al. 2019), then presence and frequency as OpenAI has them."""
    device = flat.device
    sizes = to_device([len(row.ids) for _, row in rows], device)

    def each(values: list[float]) -> Tensor:
        return to_device(values, device).repeat_interleave(sizes)

    ids = [torch.frombuffer(row.ids, dtype=torch.int64) + index * vocab for index, row in rows]
    places = torch.cat(ids).to(device)
    counts = torch.cat([torch.frombuffer(row.counts, dtype=torch.float32) for _, row in rows]).to(device)
    repetition = each([max(row.settings.repetition_penalty, LEAST_REPETITION) for _, row in rows])
    presence = each([row.settings.presence_penalty for _, row in rows])
    frequency = each([row.settings.frequency_penalty for _, row in rows])
    known = flat.index_select(0, places)
    known = torch.where(known > 0, known / repetition, known * repetition)
    flat.index_copy_(0, places, known - presence * (counts > 0) - frequency * counts)


def _draw_whole(probabilities: Tensor, settings: Sequence[Sampling], chances: Tensor) -> Tensor:
    """Tokens of rows without top_k and top_p: nothing needs sorting."""
    if any(setting.min_p > 0 for setting in settings):
        least = _column([min(setting.min_p, 1.0) for setting in settings], probabilities)
        floor = least * probabilities.amax(dim=-1, keepdim=True)
        probabilities = probabilities.where(probabilities >= floor, 0.0)
    ids = torch.arange(probabilities.shape[-1], dtype=torch.int32, device=probabilities.device)
    return winner(probabilities, ids, chances)


def _draw_truncated(
    probabilities: Tensor, settings: Sequence[Sampling], chances: Tensor, waits: bool
) -> Tensor:
    """Tokens of rows with top_k or top_p: each from the fewest candidates that are provably enough. How many
    top_p needs has to be read; if nobody waits for that, everything is sorted.
    """
    vocab = probabilities.shape[-1]
    device = probabilities.device
    tokens = torch.empty(len(settings), dtype=torch.int64, device=device)
    left = list(range(len(settings)))
    for width in (*(few for few in CANDIDATES if few < vocab), vocab):
        rows = left if waits or width == vocab else [row for row in left if 0 < settings[row].top_k <= width]
        if not rows:
            continue
        own = probabilities.index_select(0, to_device(rows, device))
        likeliest, ids = own.topk(width, dim=-1)
        covered = likeliest.sum(dim=-1).tolist() if waits else [0.0] * len(rows)
        enough = [_enough(settings[row], width, total) for row, total in zip(rows, covered, strict=True)]
        ready = [i for i, found in enumerate(enough) if found or width == vocab]
        if ready:
            done = [rows[i] for i in ready]
            places, at = to_device(ready, device), to_device(done, device)
            sorted_ones, ids = likeliest.index_select(0, places), ids.index_select(0, places)
            kept = _kept_of_sorted(sorted_ones, [settings[row] for row in done])
            rank = winner(kept, ids, chances.index_select(0, at))
            tokens.index_copy_(0, at, ids.gather(1, rank.unsqueeze(1)).squeeze(1))
            left = [row for row in left if row not in done]
    return tokens


def _enough(setting: Sampling, width: int, covered: float) -> bool:
    """True if no token outside the `width` likeliest, whose probabilities sum to `covered`, may come."""
    return setting.top_k <= width if setting.top_k > 0 else covered >= setting.top_p


def _kept_of_sorted(probabilities: Tensor, settings: Sequence[Sampling]) -> Tensor:
    """Rows that are sorted from likeliest down, with 0 for tokens that may not come."""
    width = probabilities.shape[-1]
    top_k = _column([setting.top_k if setting.top_k > 0 else width for setting in settings], probabilities)
    top_p = _column([setting.top_p for setting in settings], probabilities, torch.float64)
    min_p = _column([min(setting.min_p, 1.0) for setting in settings], probabilities)
    ranks = torch.arange(width, device=probabilities.device)
    kept = probabilities.where(ranks < top_k, 0.0)
    # top_p is a share of what top_k left, which without top_k is everything.
    share = kept.sum(dim=-1, keepdim=True, dtype=torch.float64)
    share = share.where(_column([setting.top_k for setting in settings], share) > 0, 1.0)
    kept = kept.where(kept >= min_p * probabilities.narrow(1, 0, 1), 0.0)
    before = torch.cumsum(kept, dim=-1, dtype=torch.float64) - kept
    return kept.where((before < top_p * share) | (ranks == 0), 0.0)


def _column(values: Sequence[float], like: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return to_device(values, like.device, dtype).unsqueeze(1)
