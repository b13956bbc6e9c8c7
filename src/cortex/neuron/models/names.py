"""What the two formats call the tensors that families share. Knows no parameters and reads no files."""

from __future__ import annotations

from typing import Final, NamedTuple

from cortex.neuron.models.shape import HEAD_NAMES


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


class Stacks(NamedTuple):
    gate: str
    up: str
    gate_up: str
    down: str


class ExpertNames(NamedTuple):
    """`each`, gate, up and down, takes an expert's index; `shared` is the one that all tokens take."""

    router: str
    each: tuple[str, str, str]
    stacks: Stacks
    shared: tuple[str, str, str]
    shared_gate: str


HUGGING_FACE_EXPERTS: Final = ExpertNames(
    router="mlp.gate",
    each=(
        "mlp.experts.{}.gate_proj.weight",
        "mlp.experts.{}.up_proj.weight",
        "mlp.experts.{}.down_proj.weight",
    ),
    stacks=Stacks(
        "mlp.experts.gate_proj", "mlp.experts.up_proj", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
    ),
    shared=("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj", "mlp.shared_expert.down_proj"),
    shared_gate="mlp.shared_expert_gate",
)
GGUF_EXPERTS: Final = ExpertNames(
    router="ffn_gate_inp",
    each=("ffn_gate.{}.weight", "ffn_up.{}.weight", "ffn_down.{}.weight"),
    stacks=Stacks(
        "ffn_gate_exps.weight", "ffn_up_exps.weight", "ffn_gate_up_exps.weight", "ffn_down_exps.weight"
    ),
    shared=("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    shared_gate="ffn_gate_inp_shexp",
)


def hugging_face(prefix: str) -> Names:
    """The names behind `prefix`, one of HEAD_NAMES."""
    names = HUGGING_FACE
    return names._replace(
        embedding=prefix + names.embedding,
        norm=prefix + names.norm,
        layer=prefix + names.layer,
        head=HEAD_NAMES[prefix],
    )
