"""The KV cache: rows of keys and values in fp32, preallocated, and attention over them in stock torch.

A sequence's rows lie in a few runs; what its queries see in each is merged by log-sum-exp, and only
what several sequences see at their ends is gathered. The rows of each head lie together, as attention reads
one head after the other, and memory gives less to reads that skip. Whoever plans the steps owns the rows.
Knows no model.
"""

from __future__ import annotations

import contextlib
import functools
import math
import mmap
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from cortex.neuron.nn.looks import FEW, Gathered, View
from cortex.neuron.nn.plan import Copy
from cortex.neuron.nn.step import Access, Step

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
"""Scales by 1 / sqrt(width) by itself, as `_plain` does; gives the log of the sum of exponentials too."""

HOST: Final = torch.device("cpu")
TOGETHER: Final = 64
"""Rows of a prompt that look at themselves and at what came before them at a time."""
SCORES: Final = 2**24
"""Elements of scores that plain attention computes at a time."""


class RunCache:
    """`rows` tokens for every layer, of as many sequences as they hold; layers in `near` have a window."""

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        width: int,
        device: torch.device,
        *,
        near: Collection[int] = (),
    ) -> None:
        self._stored = reserved((layers, 2, kv_heads, rows, width), device)
        self.nbytes = self._stored.nbytes
        self.layers = [LayerRuns(layer, index in near) for index, layer in enumerate(self._stored.unbind())]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy rows of every layer, one order after the other."""
        for source, target, count in _joined(copies):
            self._stored.narrow(3, target, count).copy_(self._stored.narrow(3, source, count))


def reserved(shape: tuple[int, ...], device: torch.device, *, at_once: bool = False) -> Tensor:
    """fp32 that takes no memory of the host before it is written to, and then a small page at a time: in huge
    pages a new row would stop the step until megabytes of every layer are cleared. `at_once` is for what is
    written in large pieces, which huge pages are made for.
    """
    if device.type != "cpu" or not math.prod(shape):
        return torch.empty(shape, device=device)
    memory = mmap.mmap(-1, 4 * math.prod(shape), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if at_once:
        with contextlib.suppress(OSError):  # of kernels that have none
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32, count=math.prod(shape)).view(shape)


def copy_pieces(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Each tensor by itself: it lies in one piece, and on its way to the host and back takes no memory of the
    device.
    """
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def _joined(copies: Sequence[Copy]) -> list[tuple[int, int, int]]:
    """Fewer, longer copies of the same effect: neighbours that go to neighbours go at once."""
    joined: list[tuple[int, int, int]] = []
    for copy in copies:
        if joined:
            source, target, count = joined[-1]
            clear = abs(source - target) >= count + copy.count
            if source + count == copy.source and target + count == copy.target and clear:
                joined[-1] = (source, target, count + copy.count)
                continue
        joined.append((copy.source, copy.target, copy.count))
    return joined


class LayerRuns:
    """One layer of the cache, fp32 [2, kv_heads, rows, width]; with `near`, one that has a window."""

    def __init__(self, stored: Tensor, near: bool = False) -> None:
        self._near = near
        self._plainly = stored.device.type != "cpu"
        """Without the flash kernel for CPUs."""
        _, self._kv_heads, rows, width = stored.shape
        self._scale = 1 / math.sqrt(width)
        self._keys, self._values = stored.unsqueeze(1).unbind()
        self._by_rows = stored.permute(2, 0, 1, 3)
        self._flat = stored.view(-1, width)
        self._heads = torch.arange(0, 2 * self._kv_heads * rows, rows, device=stored.device).view(-1, 1)
        """Where each head's rows of keys, then of values, begin in the flat view."""

    def write(self, step: Step, keys_values: Tensor) -> None:
        """Store fp32 [T, 2, kv_heads, width] in the rows of the step."""
        access = self._access(step)
        if access.first_slot is not None:
            self._by_rows.narrow(0, access.first_slot, keys_values.shape[0]).copy_(keys_values)
        else:
            self._by_rows.index_copy_(0, access.slots, keys_values)

    def attend(self, step: Step, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Causal attention of [T, heads, width] to what is stored, within the window: [T, heads * width]."""
        rows, heads, width = queries.shape
        looks = self._access(step).looks
        if looks.in_order:
            seen = [self._look(view, queries, keys_values)[0] for view in looks.views]
            return (seen[0] if len(seen) == 1 else torch.cat(seen)).reshape(rows, heads * width)
        merged = torch.empty_like(queries, memory_format=torch.contiguous_format)
        weights = queries.new_empty(rows, heads)
        for view in looks.views:
            _merge(merged, weights, view, *self._look(view, queries, keys_values))
        return merged.view(rows, heads * width)

    def _access(self, step: Step) -> Access:
        return step.near if self._near and step.near is not None else step.full

    def _look(self, view: View | Gathered, queries: Tensor, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """What the view's rows see: [n, heads, width], and the log of the sum of exp(score): [n, heads]."""
        if view.rows is not None:
            chosen = queries.index_select(0, view.rows)
        else:
            chosen = queries.narrow(0, view.first, view.last - view.first)
        if isinstance(view, Gathered):
            return self._gather(view, chosen)
        if view.causal:
            keys, values = keys_values.narrow(0, view.first, view.length).unbind(1)
        else:
            keys, values = (run.narrow(2, view.start, view.length) for run in (self._keys, self._values))
            if (view.mask is None or chosen.shape[0] <= FEW) and not self._plainly:
                return self._at_once(chosen, keys, values, view.mask)
            keys, values = keys.squeeze(0).transpose(0, 1), values.squeeze(0).transpose(0, 1)
        if self._plainly:
            return _plain(chosen, keys, values, self._scale, view.mask)
        if view.mask is None:
            return _causal(chosen, keys, values)
        return _each(chosen, keys, values, view.mask)

    def _gather(self, view: Gathered, queries: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of a sequence see its own keys, and they and the heads of a group are the query rows of their
        KV head.
        """
        rows, heads, width = queries.shape
        kv_heads, each = self._kv_heads, view.each
        group = heads // kv_heads
        places = view.keys.view(-1, 1, view.length) + self._heads
        gathered = self._flat.index_select(0, places.view(-1))
        keys, values = gathered.view(-1, 2, kv_heads, view.length, width).unbind(1)
        mask = view.mask
        if each == 1:
            grouped = queries.view(rows, kv_heads, group, width)
        else:
            grouped = queries.view(-1, each, kv_heads, group, width).transpose(1, 2)
            grouped = grouped.reshape(-1, kv_heads, each * group, width)
            mask = None if mask is None else mask.repeat_interleave(group, 2)
        if not self._plainly:
            seen, weight = _flash(grouped, keys, values, attn_mask=mask)
        else:
            scores = torch.matmul(grouped, keys.transpose(2, 3)).mul_(self._scale)
            parts, weight = _softmax_(scores, mask)
            seen = torch.matmul(parts, values)
        if each > 1:
            seen = seen.view(-1, kv_heads, each, group, width).transpose(1, 2)
            weight = weight.view(-1, kv_heads, each, group).transpose(1, 2)
        return seen.reshape(rows, heads, width), weight.reshape(rows, heads)

    def _at_once(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        rows, heads, width = queries.shape
        group = heads // self._kv_heads
        if rows == 1 and mask is None:
            seen, weight = _flash(queries.reshape(1, self._kv_heads, group, width), keys, values)
        else:
            every = None if mask is None else mask.repeat_interleave(group, 0)
            seen, weight = _by_groups(queries, keys, values, every)
        return seen.reshape(rows, heads, width), weight.reshape(rows, heads)


def _by_groups(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """All rows and all heads of a group are the query rows of their KV head: no keys are read twice.

    Keys and values [1, kv_heads, length, width], mask fp32 [rows * group, length]: views
    [rows, kv_heads, group, width] and, of the log of the sum of exp, [rows, kv_heads, group].
    """
    rows, heads, width = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    grouped = queries.reshape(rows, kv_heads, group, width).transpose(0, 1)
    grouped = grouped.reshape(1, kv_heads, rows * group, width)
    seen, weight = _flash(grouped, keys, values, attn_mask=mask)
    seen = seen.view(kv_heads, rows, group, width).transpose(0, 1)
    return seen, weight.view(kv_heads, rows, group).transpose(0, 1)


def _causal(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Row i sees rows [0, i].

    TOGETHER rows at a time: by itself the kernel computes up to 512 keys for every row, and hides those that
    come later afterwards.
    """
    rows, heads, width = queries.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    keys, values = keys.transpose(0, 1).unsqueeze(0), values.transpose(0, 1).unsqueeze(0)
    before = 1 << (rows - 1).bit_length()
    later = _later(group, before)
    seen, weights = queries.new_empty(rows, heads, width), queries.new_empty(rows, heads)
    for first in range(0, rows, TOGETHER):
        count = min(TOGETHER, rows - first)
        own = queries.narrow(0, first, count)
        length = first + count
        mask = later.narrow(0, 0, count * group).narrow(1, before - first, length)
        found, weight = _by_groups(own, keys.narrow(2, 0, length), values.narrow(2, 0, length), mask)
        seen.narrow(0, first, count).view(found.shape).copy_(found)
        weights.narrow(0, first, count).view(weight.shape).copy_(weight)
    return seen, weights


@functools.lru_cache(maxsize=16)
def _later(group: int, before: int) -> Tensor:
    """What hides from TOGETHER rows, `group` heads of each, those among them that come later, behind `before`
    keys that they all see: fp32 [TOGETHER * group, before + TOGETHER].
    """
    later = torch.full((TOGETHER, TOGETHER), float("-inf")).triu_(1).repeat_interleave(group, 0)
    return torch.cat((later.new_zeros(TOGETHER * group, before), later), 1)


def _each(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Each row sees what `mask`, fp32 [rows, length], lets it. KV heads are the batch, so that a group shares
    them without a copy.
    """
    rows, heads, width = queries.shape
    length, kv_heads, _ = keys.shape
    group = heads // kv_heads
    grouped = queries.view(rows, kv_heads, group, width).permute(1, 2, 0, 3)
    size = (kv_heads, group, length, width)
    shared = [run.transpose(0, 1).unsqueeze(1).expand(size) for run in (keys, values)]
    seen, weight = _flash(grouped, *shared, attn_mask=mask)
    return seen.permute(2, 0, 1, 3).reshape(rows, heads, width), weight.permute(2, 0, 1).reshape(rows, heads)


def _plain(
    queries: Tensor, keys: Tensor, values: Tensor, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in plain operations, for every device; without a mask every row sees everything.

    All heads of a group are rows of their KV head, so that keys and values are not copied for each; and so
    many rows are taken at a time that their scores stay within SCORES.
    """
    rows, heads, width = queries.shape
    length, kv_heads, _ = keys.shape
    seen, weights = queries.new_empty(rows, heads, width), queries.new_empty(rows, heads)
    keys, values = keys.permute(1, 2, 0), values.transpose(0, 1)
    most = max(1, SCORES // (heads * length))
    for first in range(0, rows, most):
        count = min(most, rows - first)
        own = queries.narrow(0, first, count).view(count, kv_heads, -1, width).transpose(0, 1)
        own = own.reshape(kv_heads, -1, width)
        scores = torch.baddbmm(queries.new_empty(1), own, keys, beta=0, alpha=scale)
        hidden = None if mask is None else mask.narrow(0, first, count).unsqueeze(1)
        parts, weight = _softmax_(scores.view(kv_heads, count, -1, length), hidden)
        found = torch.bmm(parts.view(kv_heads, -1, length), values)
        found = found.view(kv_heads, count, -1, width).transpose(0, 1)
        seen.narrow(0, first, count).view(found.shape).copy_(found)
        weights.narrow(0, first, count).view(found.shape[:3]).copy_(weight.squeeze(-1).transpose(0, 1))
    return seen, weights


def _softmax_(scores: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of `scores` [..., length] plus `mask`, in place; and the log of the sum of exp: [..., 1]."""
    if mask is not None:
        scores += mask
    weight = scores.logsumexp(-1, keepdim=True)
    return scores.sub_(weight).exp_(), weight


def _merge(merged: Tensor, weights: Tensor, view: View | Gathered, seen: Tensor, weight: Tensor) -> None:
    """Add what a view saw to what its rows saw before: softmax over both, by their log-sum-exp."""
    if view.rows is not None:
        before, known = merged.index_select(0, view.rows), weights.index_select(0, view.rows)
    else:
        count = view.last - view.first
        before, known = merged.narrow(0, view.first, count), weights.narrow(0, view.first, count)
    if not view.fresh:
        part = torch.sigmoid(weight - known).unsqueeze(-1)
        seen = torch.lerp(before, seen, part)
        weight = torch.logaddexp(known, weight)
    if view.rows is not None:
        merged.index_copy_(0, view.rows, seen)
        weights.index_copy_(0, view.rows, weight)
    else:
        before.copy_(seen)
        known.copy_(weight)
