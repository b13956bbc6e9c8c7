"""The KV cache for CUDA in pages of half precision, read by torch's own paged attention.

Opt-in (`options = {"cuda_paged": true}` in a load order) and unverified on hardware: tests run it on fake
CUDA tensors, which proves shapes, types and devices, no numbers. Owns no pages; knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import Final

import torch
from torch import Tensor

from cortex.neuron.nn.plan import Copy
from cortex.neuron.nn.step import Step

PAGE: Final = 256
"""Tokens: the least that the FlashAttention 2 built into torch takes as a page."""
EVERYTHING: Final = -1


class PagedCache:
    """`rows` tokens, a multiple of PAGE, for every layer: [layers, 2, pages, PAGE, kv_heads, width].

    The layers in `near` have the window of `window` tokens.
    """

    def __init__(
        self,
        layers: int,
        rows: int,
        kv_heads: int,
        width: int,
        device: torch.device,
        dtype: torch.dtype = torch.float16,
        *,
        near: Collection[int] = (),
        window: int | None = None,
    ) -> None:
        self._stored = torch.empty(layers, 2, rows // PAGE, PAGE, kv_heads, width, device=device, dtype=dtype)
        self.nbytes = self._stored.nbytes
        # Here, as it brings torch's compiler along: a second and many megabytes that only this cache needs.
        from torch.nn.attention.varlen import varlen_attn

        windows = [window if index in near else None for index in range(layers)]
        layers_windows = zip(self._stored.unbind(), windows, strict=True)
        self.layers = [LayerPages(varlen_attn, *each) for each in layers_windows]

    def copy(self, copies: Sequence[Copy]) -> None:
        """Copy rows of every layer, one order after the other."""
        rows = self._stored.flatten(2, 3)
        for copy in copies:
            rows.narrow(2, copy.target, copy.count).copy_(rows.narrow(2, copy.source, copy.count))


class LayerPages:
    """One layer of the cache, with a window or None; `attention` is torch's."""

    def __init__(self, attention: Callable[..., object], stored: Tensor, window: int | None = None) -> None:
        self._attention = attention
        # Keys to the left of the token and to its right; for varlen_attn the window does not count itself.
        self._window = (EVERYTHING if window is None else window - 1, 0)
        self._keys, self._values = stored.unbind()
        self._scale = 1 / math.sqrt(stored.shape[-1])

    def write(self, step: Step, keys_values: Tensor) -> None:
        """Store fp32 [T, 2, kv_heads, width] in the rows of the step."""
        halves = keys_values.to(self._keys.dtype)
        for which, stored in enumerate((self._keys, self._values)):
            stored.flatten(0, 1).index_copy_(0, step.full.slots, halves.select(1, which))

    def attend(self, step: Step, queries: Tensor, keys_values: Tensor) -> Tensor:
        """Causal attention of fp32 [T, heads, width] to all that is stored: [T, heads * width].

        One split of the keys, always: with several, FlashAttention 2 gives wrong rows on pages, and a
        row's result would depend on its batch mates.
        """
        pages = step.pages
        if pages is None:
            raise ValueError("the step was prepared for a cache without pages")
        seen = self._attention(
            queries.to(self._keys.dtype),
            self._keys,
            self._values,
            pages.query_ends,
            pages.key_ends,
            pages.most_queries,
            pages.most_keys,
            scale=self._scale,
            window_size=self._window,
            enable_gqa=True,
            seqused_k=pages.key_counts,
            block_table=pages.table,
            num_splits=1,
        )
        assert isinstance(seen, Tensor)
        return seen.to(queries.dtype).flatten(1)
