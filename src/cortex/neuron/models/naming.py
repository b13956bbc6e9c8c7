"""How a checkpoint calls the tensors that every family has, and from which of them each parameter comes.

Knows the parameters of `cortex.neuron.models.decoder` by their names; reads no files.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from cortex.neuron.models.shape import HEAD_NAMES, ModelShape
from cortex.neuron.nn.placement import Share
from cortex.neuron.weights.source import Change, Piece, Source

Sources = dict[str, Source]
"""By the name of the parameter."""


class Names(NamedTuple):
    """In one format; `layer` takes a layer's index and stands before those of its tensors."""

    embedding: str
    norm: str
    head: str
    layer: str
    attention_norm: str
    queries: str
    keys: str
    values: str
    output: str
    query_norm: str
    key_norm: str
    mlp_norm: str
    gate: str
    up: str
    down: str


HUGGING_FACE: Final = Names(
    embedding="embed_tokens",
    norm="norm",
    head="lm_head",
    layer="layers.{}.",
    attention_norm="input_layernorm",
    queries="self_attn.q_proj",
    keys="self_attn.k_proj",
    values="self_attn.v_proj",
    output="self_attn.o_proj",
    query_norm="self_attn.q_norm",
    key_norm="self_attn.k_norm",
    mlp_norm="post_attention_layernorm",
    gate="mlp.gate_proj",
    up="mlp.up_proj",
    down="mlp.down_proj",
)
GGUF: Final = Names(
    embedding="token_embd",
    norm="output_norm",
    head="output",
    layer="blk.{}.",
    attention_norm="attn_norm",
    queries="attn_q",
    keys="attn_k",
    values="attn_v",
    output="attn_output",
    query_norm="attn_q_norm",
    key_norm="attn_k_norm",
    mlp_norm="ffn_norm",
    gate="ffn_gate",
    up="ffn_up",
    down="ffn_down",
)


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
        table = names.embedding if self.shape.tied else names.head
        own = self.share.spread(self.shape.vocab)
        return {
            "embedding.weight": (Piece(f"{names.embedding}.weight", *own),),
            "norm.weight": self.norm(names.norm),
            "head.rows.weight": (Piece(f"{table}.weight", *own),),
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
        queries = self.share.of(shape.heads * width, width)
        found: Sources = {
            f"{here}output.weight": (Piece(f"{there}{names.output}.weight", columns=queries),),
            f"{here}output.bias": (Piece(f"{there}{names.output}.bias"),),
        }
        for part in ("weight", "bias"):
            q, k, v = (f"{there}{name}.{part}" for name in (names.queries, names.keys, names.values))
            found[f"{here}qkv.{part}"] = self._queries_keys_values(q, k, v)
        if shape.qk_norm:
            found[f"{here}norm.weight"] = (
                *self._rotated(f"{there}{names.query_norm}.weight", 0, self._change),
                *self._rotated(f"{there}{names.key_norm}.weight", 0, self._change),
            )
        return found

    def _queries_keys_values(self, queries: str, keys: str, values: str) -> Source:
        """Heads of queries, keys and values, and the gates, which lie behind the queries head by head."""
        shape, width = self.shape, self.shape.head_dim
        own = self.share.of(shape.heads * width, width)
        own_keys = self.share.of(shape.kv_heads * width, width)
        if not shape.gated and shape.rotary == width:
            pairs = 0 if self._paired else width
            return (
                Piece(queries, *own, pairs=pairs),
                Piece(keys, *own_keys, pairs=pairs),
                Piece(values, *own_keys),
            )
        step = 2 * width if shape.gated else width
        heads = [step * head for head in range(own[0] // width, own[1] // width)]
        gates = [Piece(queries, at + width, at + step) for at in heads if shape.gated]
        return (
            *(piece for at in heads for piece in self._rotated(queries, at)),
            *(piece for at in range(*own_keys, width) for piece in self._rotated(keys, at)),
            Piece(values, *own_keys),
            *gates,
        )

    def _rotated(self, tensor: str, at: int, change: Change = "") -> Source:
        """The rows of one head from `at` on, those that are rotated first."""
        width, rotary = self.shape.head_dim, self.shape.rotary
        pairs = 0 if self._paired else rotary
        turned = Piece(tensor, at, at + rotary, pairs=pairs, change=change)
        rest = Piece(tensor, at + rotary, at + width, change=change)
        return (turned,) if rotary == width else (turned, rest)

    def mlp(self, index: int) -> Sources:
        """Of a `GatedMLP`."""
        here, there = f"layers.{index}.mlp.", self.layer(index)
        gate, up, down = self.names.gate, self.names.up, self.names.down
        own = self.share.of(self.shape.intermediate)
        found: Sources = {
            f"{here}down.weight": (Piece(f"{there}{down}.weight", columns=own),),
            f"{here}down.bias": (Piece(f"{there}{down}.bias"),),
        }
        for part in ("weight", "bias"):
            found[f"{here}gate_up.{part}"] = (
                Piece(f"{there}{gate}.{part}", *own),
                Piece(f"{there}{up}.{part}", *own),
            )
        return found


def hugging_face(prefix: str) -> Names:
    """The names behind `prefix`, one of HEAD_NAMES."""
    names = HUGGING_FACE
    return names._replace(
        embedding=prefix + names.embedding,
        norm=prefix + names.norm,
        layer=prefix + names.layer,
        head=HEAD_NAMES[prefix],
    )


def dense_sources(layout: Layout) -> Sources:
    """Of a `Decoder` whose layers are all a `dense_layer`."""
    found = layout.frame()
    for index in range(layout.shape.layers):
        found |= layout.pre_norms(index) | layout.attention(index) | layout.mlp(index)
    return found
