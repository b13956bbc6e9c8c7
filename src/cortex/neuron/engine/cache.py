"""The KV cache: preallocated, one contiguous slot for each running sequence, fp32.

Stores and attends for the layers; whoever plans the steps owns the slots. Knows no model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from cortex.neuron.nn.step import Span, Step


class SlotCache:
    """`slots` sequences of up to `context` tokens each, for every layer."""

    def __init__(
        self, layers: int, slots: int, kv_heads: int, width: int, context: int, device: torch.device
    ) -> None:
        stored = torch.empty(layers, slots, 2, 1, kv_heads, context, width, device=device)
        self.nbytes = stored.nbytes
        self.layers = [LayerSlots(layer, kv_heads) for layer in stored.unbind()]


class LayerSlots:
    """One layer of the cache, fp32 [slots, 2, 1, kv_heads, context, width]."""

    def __init__(self, stored: Tensor, kv_heads: int) -> None:
        self._slots = stored.unbind()
        self._kv_heads = kv_heads

    def write(self, step: Step, keys_values: Tensor) -> None:
        """Store fp32 [T, 2, kv_heads, width] at the positions of the step."""
        for span in step.spans:
            rows = keys_values.narrow(0, span.first, span.last - span.first)
            slot = self._slots[span.slot].narrow(3, span.start, span.end - span.start)
            slot.copy_(rows.permute(1, 2, 0, 3).unsqueeze(1))

    def attend(self, step: Step, queries: Tensor) -> Tensor:
        """Causal attention of fp32 [T, heads, width] to all that is stored: [T, heads * width]."""
        if len(step.spans) == 1:
            return self._attend(step.spans[0], queries)
        return torch.cat(
            [self._attend(span, queries.narrow(0, span.first, span.last - span.first)) for span in step.spans]
        )

    def _attend(self, span: Span, queries: Tensor) -> Tensor:
        keys, values = self._slots[span.slot].narrow(3, 0, span.end).unbind()
        rows, heads, width = queries.shape
        if rows == 1:
            # The heads of a group are the query rows of their KV head: nothing is expanded.
            grouped = queries.view(1, self._kv_heads, heads // self._kv_heads, width)
            return F.scaled_dot_product_attention(grouped, keys, values).reshape(1, heads * width)
        attended = F.scaled_dot_product_attention(
            queries.transpose(0, 1).unsqueeze(0),
            keys,
            values,
            attn_mask=span.mask,
            is_causal=span.mask is None,
            enable_gqa=True,
        )
        return attended.squeeze(0).transpose(0, 1).reshape(rows, heads * width)
