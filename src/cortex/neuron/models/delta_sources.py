"""From which rows of a checkpoint a rank's parameters of a Gated DeltaNet layer come, in every layout.

Qwen3.5 has [Q | K | V] in one tensor, of which a rank has its rows of all three; Qwen3-Next has [q, k, v, z]
and [b, a] key head by key head. In tiled files a rank's value heads lie apart. Knows no torch.
Reference: modeling_qwen3_next.py and modeling_qwen3_5.py of transformers; llama.cpp's convert_hf_to_gguf.py.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cortex.neuron.models.shape import DeltaShape
from cortex.neuron.nn.placement import Share
from cortex.neuron.weights.source import Change, Piece, Source, whole


class _Names(NamedTuple):
    """How a checkpoint format calls the tensors of a layer, after the layer's prefix; of `qkv` and `z`, and
    of `b` and `alpha`, each pair may be one tensor instead.
    """

    qkv: str
    z: str
    qkvz: str
    b: str
    alpha: str
    ba: str
    conv: str
    a: str
    dt_bias: str
    norm: str
    output: str


_HUGGING_FACE: Final = _Names(
    qkv="in_proj_qkv.weight",
    z="in_proj_z.weight",
    qkvz="in_proj_qkvz.weight",
    b="in_proj_b.weight",
    alpha="in_proj_a.weight",
    ba="in_proj_ba.weight",
    conv="conv1d.weight",
    a="A_log",
    dt_bias="dt_bias",
    norm="norm.weight",
    output="out_proj.weight",
)
_GGUF: Final = _Names(
    qkv="attn_qkv.weight",
    z="attn_gate.weight",
    qkvz="ssm_in.weight",
    b="ssm_beta.weight",
    alpha="ssm_alpha.weight",
    ba="ssm_ba.weight",
    conv="ssm_conv1d.weight",
    a="ssm_a",
    dt_bias="ssm_dt.bias",
    norm="ssm_norm.weight",
    output="ssm_out.weight",
)


def delta_sources(prefix: str, kind: str, shape: DeltaShape, share: Share) -> dict[str, Source]:
    """Of every parameter of `nn.delta.GatedDeltaNet`, by its name in the layer, in a checkpoint of `kind`.

    `prefix` is what the layer's tensors have before their own name: `model.layers.3.linear_attn.` in Hugging
    Face checkpoints, `blk.3.` in GGUF.
    """
    names = _Names(*(prefix + name for name in (_GGUF if kind == "gguf" else _HUGGING_FACE)))
    change: Change = "" if kind == "gguf" else "minus_exp"
    part = _Part(shape, share)
    heads, all_heads = part.values(1), shape.value_heads
    return {
        "projection.weight": part.joined_qkvz(names.qkvz)
        if shape.joined_qkvz
        else (*part.channels(names.qkv), *_pieces(names.z, part.values(shape.value_width), shape.values)),
        "gates.weight": part.joined_ba(names.ba)
        if shape.joined_ba
        else (*_pieces(names.b, heads, all_heads), *_pieces(names.alpha, heads, all_heads)),
        "gates.a": tuple(Piece(names.a, *rows, change=change, of=all_heads) for rows in heads),
        "gates.dt_bias": _pieces(names.dt_bias, heads, all_heads),
        "conv.weight": part.channels(names.conv),
        "norm.weight": whole(names.norm),
        "output.weight": tuple(
            Piece(names.output, columns=columns, of=shape.values)
            for columns in part.values(shape.value_width)
        ),
    }


def _pieces(tensor: str, ranges: list[tuple[int, int]], rows: int) -> Source:
    """Of a tensor that has so many rows in all."""
    return tuple(Piece(tensor, start, stop, of=rows) for start, stop in ranges)


class _Part:
    """A rank's part of the heads: some key heads, and the value heads that go with them."""

    def __init__(self, shape: DeltaShape, share: Share) -> None:
        self._shape = shape
        self._first, self._last = share.of(shape.key_heads)
        self._apart = shape.tiled and share.world > 1

    def values(self, width: int, start: int = 0) -> list[tuple[int, int]]:
        """Rows of the value heads, `width` each, in a region that begins at `start`."""
        shape, turns = self._shape, range(1)
        if self._apart:
            turns = range(shape.groups)
        else:
            width *= shape.groups
        firsts = [start + turn * shape.key_heads * width for turn in turns]
        return [(first + self._first * width, first + self._last * width) for first in firsts]

    def channels(self, tensor: str) -> Source:
        """Of [Q | K | V]."""
        width = self._shape.key_width
        all_keys = self._shape.key_heads * width
        keys = [(start + self._first * width, start + self._last * width) for start in (0, all_keys)]
        values = self.values(self._shape.value_width, 2 * all_keys)
        return _pieces(tensor, keys + values, self._shape.channels)

    def joined_qkvz(self, tensor: str) -> Source:
        """Of [q, k, v, z] of each key head."""
        values = self._shape.groups * self._shape.value_width
        return self._sorted(tensor, (self._shape.key_width, self._shape.key_width, values, values))

    def joined_ba(self, tensor: str) -> Source:
        """Of [b, alpha] of each key head."""
        return self._sorted(tensor, (self._shape.groups, self._shape.groups))

    def _sorted(self, tensor: str, widths: tuple[int, ...]) -> Source:
        """From regions of these widths in each key head's rows: the first of all heads, the second of all."""
        block = sum(widths)
        rows = self._shape.key_heads * block
        starts = [sum(widths[:at]) for at in range(len(widths))]
        return tuple(
            Piece(tensor, head * block + start, head * block + start + width, of=rows)
            for start, width in zip(starts, widths, strict=True)
            for head in range(self._first, self._last)
        )
