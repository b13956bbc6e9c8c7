"""From which tensors of a checkpoint the parameters come that families share, for each rank its own.

Knows the parameters of `cortex.neuron.models.decoder` by their names; reads no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from cortex.neuron.models.names import GGUF, GGUF_EXPERTS, HUGGING_FACE_EXPERTS, ExpertNames, hugging_face
from cortex.neuron.models.shape import ExpertsShape, ModelShape
from cortex.neuron.nn.placement import Share
from cortex.neuron.weights.source import Change, Piece, Source

Sources = dict[str, Source]
"""By the name of the parameter."""


class Layout:
    """A rank's parameters in a checkpoint of `kind`: each method gives the sources of some of them.

    `zero_centred` norms are stored around zero, but for GGUF files, which have the 1 added. `paired` says
    that rotary pairs are neighbours in the file already. Norms are whole on every rank.
    """

    def __init__(
        self, shape: ModelShape, kind: str, share: Share, *, zero_centred: bool = False, paired: bool = False
    ) -> None:
        self.shape: Final = shape
        self.share: Final = share
        self.is_gguf: Final = kind == "gguf"
        self.names: Final = GGUF if self.is_gguf else hugging_face(shape.prefix)
        self._change: Change = "one_plus" if zero_centred and not self.is_gguf else ""
        self._paired = paired

    def layer(self, index: int) -> str:
        """What the names of the layer's tensors begin with."""
        return self.names.layer.format(index)

    def frame(self) -> Sources:
        """Of what stands around the layers."""
        names = self.names
        table = names.head if self.shape.table_is_head else names.embedding
        head = table if self.shape.tied else names.head
        vocab = self.shape.vocab
        own = self.share.spread(vocab)
        return {
            "embedding.weight": (Piece(f"{table}.weight", *own, of=vocab),),
            "norm.weight": self.norm(names.norm),
            "head.rows.weight": (Piece(f"{head}.weight", *own, of=vocab),),
        }

    def norm(self, tensor: str) -> Source:
        return (Piece(f"{tensor}.weight", change=self._change),)

    def pre_norms(self, index: int) -> Sources:
        """Of a `PreNormLayer`."""
        here, there = f"layers.{index}.", self.layer(index)
        return {
            f"{here}attention_norm.weight": self.norm(there + self.names.attention_norm),
            f"{here}mlp_norm.weight": self.norm(there + self.names.mlp_norm),
        }

    def attention(self, index: int) -> Sources:
        shape, names = self.shape, self.names
        here, there = f"layers.{index}.attention.", self.layer(index)
        width = shape.head_dim
        everything = shape.heads * width
        queries = self.share.of(everything, width)
        found: Sources = {
            f"{here}output.weight": (Piece(f"{there}{names.output}.weight", columns=queries, of=everything),),
            f"{here}output.bias": (Piece(f"{there}{names.output}.bias"),),
        }
        for part in ("weight", "bias"):
            q, k, v = (f"{there}{name}.{part}" for name in (names.queries, names.keys, names.values))
            found[f"{here}qkv.{part}"] = self._queries_keys_values(q, k, v)
        if shape.qk_norm:
            found[f"{here}norm.weight"] = (
                *self._rotated(f"{there}{names.query_norm}.weight", 0, width, self._change),
                *self._rotated(f"{there}{names.key_norm}.weight", 0, width, self._change),
            )
        return found

    def _queries_keys_values(self, queries: str, keys: str, values: str) -> Source:
        """Heads of queries, keys and values, and the gates, which lie behind the queries head by head."""
        shape, width = self.shape, self.shape.head_dim
        all_keys = shape.kv_heads * width
        own, own_keys = self.share.of(shape.heads * width, width), self.share.of(all_keys, width)
        own_values = Piece(values, *own_keys, of=all_keys)
        if not shape.gated and shape.rotary == width:
            pairs = 0 if self._paired else width
            return (
                Piece(queries, *own, pairs=pairs, of=shape.heads * width),
                Piece(keys, *own_keys, pairs=pairs, of=all_keys),
                own_values,
            )
        step = 2 * width if shape.gated else width
        rows = shape.heads * step
        heads = [step * head for head in range(own[0] // width, own[1] // width)]
        gates = [Piece(queries, at + width, at + step, of=rows) for at in heads if shape.gated]
        return (
            *(piece for at in heads for piece in self._rotated(queries, at, rows)),
            *(piece for at in range(*own_keys, width) for piece in self._rotated(keys, at, all_keys)),
            own_values,
            *gates,
        )

    def _rotated(self, tensor: str, at: int, rows: int, change: Change = "") -> Source:
        """The rows of one head from `at` on, those that are rotated first; the tensor has so many `rows`."""
        width, rotary = self.shape.head_dim, self.shape.rotary
        pairs = 0 if self._paired else rotary
        turned = Piece(tensor, at, at + rotary, pairs=pairs, change=change, of=rows)
        rest = Piece(tensor, at + rotary, at + width, change=change, of=rows)
        return (turned,) if rotary == width else (turned, rest)

    def mlp(self, index: int) -> Sources:
        """Of what the layer has: experts or one gated MLP."""
        if self.shape.experts is not None and self.shape.has_experts(index):
            return self._experts(index, self.shape.experts)
        names = self.names
        here, there = f"layers.{index}.mlp.", self.layer(index)
        return self.gated(here, [there + name for name in (names.gate, names.up, names.down)])

    def gated(self, here: str, tensors: Sequence[str], size: int | None = None) -> Sources:
        """Of a `GatedMLP` of that intermediate size; `tensors` are those of gate, up and down."""
        gate, up, down = tensors
        size = size or self.shape.intermediate
        own = self.share.of(size)
        found: Sources = {
            f"{here}down.weight": (Piece(f"{down}.weight", columns=own, of=size),),
            f"{here}down.bias": (Piece(f"{down}.bias"),),
        }
        for part in ("weight", "bias"):
            found[f"{here}gate_up.{part}"] = (
                Piece(f"{gate}.{part}", *own, of=size),
                Piece(f"{up}.{part}", *own, of=size),
            )
        return found

    def _experts(self, index: int, experts: ExpertsShape) -> Sources:
        """Of `Experts`: those of this rank by their index, which is another one in its module."""
        here, there = f"layers.{index}.mlp.", self.layer(index)
        names = GGUF_EXPERTS if self.is_gguf else HUGGING_FACE_EXPERTS
        first, last = self.share.of(experts.count)
        found: Sources = {
            f"{here}router.weight": (Piece(f"{there}{names.router}.weight"),),
            f"{here}shared_gate.weight": (Piece(f"{there}{names.shared_gate}.weight"),),
        }
        if experts.shared_intermediate:
            shared = [there + name for name in names.shared]
            found |= self.gated(f"{here}shared.", shared, experts.shared_intermediate)
        for expert in range(first, last):
            mine = f"{here}experts.{expert - first}."
            gate_up, down = _of_expert(there, names, experts, expert, self.shape.hidden)
            found[f"{mine}gate_up.weight"] = gate_up
            found[f"{mine}down.weight"] = (down,)
        return found


def _of_expert(
    there: str, names: ExpertNames, experts: ExpertsShape, expert: int, hidden: int
) -> tuple[Source, Piece]:
    """Of gate and up, and of down. Stacks are rows, the expert's after those of the ones before it."""
    size = experts.intermediate
    if experts.stored == "each":
        gate, up, down = (f"{there}{name.format(expert)}" for name in names.each)
        return (Piece(gate, of=size), Piece(up, of=size)), Piece(down)
    stacks = names.stacks

    def stacked(name: str, rows: int) -> Piece:
        return Piece(there + name, expert * rows, (expert + 1) * rows, of=experts.count * rows)

    down_rows = stacked(stacks.down, hidden)
    if experts.stored == "fused":
        return (stacked(stacks.gate_up, 2 * size),), down_rows
    return (stacked(stacks.gate, size), stacked(stacks.up, size)), down_rows


def attention_sources(layout: Layout) -> Sources:
    """Of a `Decoder` whose layers are all an `attention_layer`."""
    found = layout.frame()
    for index in range(layout.shape.layers):
        found |= layout.pre_norms(index) | layout.attention(index) | layout.mlp(index)
    return found
