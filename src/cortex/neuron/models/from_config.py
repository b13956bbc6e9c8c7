"""The shape of a model from config.json, as transformers writes it, in the old and the new style.

Keys, defaults and what they mean are those of transformers' configuration classes. Knows no torch.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

from cortex.neuron.models.fields import MOST, MOST_LAYERS, MOST_PARTS, Fields
from cortex.neuron.models.registry import HYBRID, WITH_EXPERTS, family_name
from cortex.neuron.models.shape import (
    HEAD_NAMES,
    LEAST_TURNS,
    Activation,
    DeltaShape,
    ExpertsShape,
    Kind,
    Llama3Scaling,
    ModelShape,
    Rope,
    YarnScaling,
    yarn_attention,
)
from cortex.neuron.weights.checkpoint import CONFIG, Checkpoint
from cortex.wire.errors import LoadFailed

_ALIKE: Final = ("mistral", "qwen3_moe")
"""Families whose layers all have the window if there is one: transformers does not read their layer_types."""
_QWEN: Final = {"max_position_embeddings": 32768}
_DELTA: Final = {
    **_QWEN,
    "head_dim": 256,
    "partial_rotary_factor": 0.25,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
_DEFAULTS: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "qwen3_moe": _QWEN,
    "gemma3": {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131072,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "qwen3_next": {**_DELTA, "norm_topk_prob": True},
    "qwen3_5": _DELTA,
    "qwen3_5_moe": _DELTA,
}
"""By family, what a file may leave out."""

_KINDS: Final[Mapping[str, Kind]] = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "linear_attention": "delta",
}
_ACTIVATIONS: Final[Mapping[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_QK_NORM: Final = ("qwen3", "qwen3_moe", "gemma3", *HYBRID)
_ORIGINAL: Final = "original_max_position_embeddings"


def shape_from_config(checkpoint: Checkpoint) -> ModelShape:
    """Of a checkpoint with images too, its text part. Raises LoadFailed."""
    family = family_name(checkpoint.architecture)
    defaults = _DEFAULTS.get(family, {})
    top = Fields(checkpoint.path, {**defaults, **checkpoint.config}, "", CONFIG)
    text = top.section("text_config") or checkpoint.config
    fields = top.inner({**defaults, **text}, CONFIG)
    prefix, tied, table = _tables(top, checkpoint)
    layers = fields.size("num_hidden_layers", most=MOST_LAYERS)
    heads = fields.size("num_attention_heads", most=MOST_PARTS)
    hidden = fields.size("hidden_size")
    width = fields.size("head_dim", hidden // heads)
    window = _window(fields, family)
    kinds = _kinds(fields, family, layers, window)
    experts, dense_layers = _experts(fields, family, layers, checkpoint, f"{prefix}layers.")
    is_gemma, is_qwen2, is_hybrid = family == "gemma3", family == "qwen2", family in HYBRID
    rope, local_rope = _ropes(fields, is_gemma)
    return ModelShape(
        architecture=checkpoint.architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=fields.size("num_key_value_heads", heads),
        head_dim=width,
        intermediate=fields.size("intermediate_size", experts.intermediate if experts else None),
        vocab=fields.size("vocab_size"),
        max_position=rope.context(fields.size("max_position_embeddings")),
        rope=rope,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=tied,
        qkv_bias=is_qwen2 or fields.flag("attention_bias"),
        output_bias=not is_qwen2 and fields.flag("attention_bias"),
        mlp_bias=family == "llama" and fields.flag("mlp_bias"),
        prefix=prefix,
        table_is_head=table == f"{HEAD_NAMES[prefix]}.weight",
        activation=_activation(fields),
        rotary_dim=_rotary_dim(fields, width, is_hybrid),
        qk_norm=family in _QK_NORM,
        gated=is_hybrid,
        post_norms=is_gemma,
        kinds=kinds,
        window=window if "sliding" in kinds else None,
        local_rope=local_rope if "sliding" in kinds else None,
        query_scale=fields.positive("query_pre_attn_scalar") ** -0.5 if is_gemma else None,
        embedding_scale=_embedding_scale(checkpoint, table, hidden) if is_gemma else None,
        logit_cap=fields.positive("final_logit_softcapping") if "final_logit_softcapping" in fields else None,
        delta=_delta(fields, family) if "delta" in kinds else None,
        experts=experts,
        dense_layers=dense_layers,
    )


def _tables(top: Fields, checkpoint: Checkpoint) -> tuple[str, bool, str]:
    """The prefix, whether the head is tied to the table, and the table's tensor. Of tied ones that share
    their memory a file may have either name alone.
    """
    names, ties = checkpoint.tensors, top.flag("tie_word_embeddings")
    prefixes = [p for p in HEAD_NAMES if f"{p}embed_tokens.weight" in names]
    prefixes += [p for p in HEAD_NAMES if f"{p}norm.weight" in names]
    prefix = next(iter(prefixes), "model.")
    table, head = f"{prefix}embed_tokens.weight", f"{HEAD_NAMES[prefix]}.weight"
    if head not in names and not ties:
        raise LoadFailed(f"{checkpoint.path} lacks tensor {head}, and {CONFIG} ties no embeddings.")
    if ties and head in names and table not in names:
        return prefix, True, head
    return prefix, head not in names, table


def _activation(fields: Fields) -> Activation:
    name = fields.get("hidden_activation", fields.get("hidden_act", "silu"))
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise fields.refuse(f"the activation {name!r} ({', '.join(_ACTIVATIONS)} are)")
    return _ACTIVATIONS[name]


def _window(fields: Fields, family: str) -> int | None:
    """Qwen's files name a window that their models do not use."""
    has_window = family in ("mistral", "gemma3") or fields.flag("use_sliding_window")
    if not has_window or "sliding_window" not in fields:
        return None
    if fields.flag("use_bidirectional_attention"):
        raise fields.refuse("bidirectional attention")
    return fields.size("sliding_window")


def _kinds(fields: Fields, family: str, layers: int, window: int | None) -> tuple[Kind, ...]:
    """Empty where all layers attend to everything."""
    named = None if family in _ALIKE else fields.get("layer_types")
    kinds: list[Kind] = []
    if named is not None:
        if not isinstance(named, list) or len(named) != layers:
            raise fields.refuse(f"layer_types that are not one for each of {layers} layers")
        for name in named:
            if not isinstance(name, str) or name not in _KINDS:
                raise fields.refuse(f"the layer type {name!r} ({', '.join(_KINDS)} are)")
            kinds.append(_KINDS[name])
        if "delta" in kinds and family not in HYBRID:
            raise fields.refuse(f"linear attention in {family}")
    else:
        kinds = [_kind(fields, family, index) for index in range(layers)]
    if window is None:
        kinds = ["full" if kind == "sliding" else kind for kind in kinds]
    return () if set(kinds) <= {"full"} else tuple(kinds)


def _kind(fields: Fields, family: str, index: int) -> Kind:
    """Of a layer in a file that does not name its layers' types."""
    if family in HYBRID:
        return "delta" if (index + 1) % max(1, fields.integer("full_attention_interval", 4)) else "full"
    if family == "gemma3":
        return "sliding" if (index + 1) % max(1, fields.integer("sliding_window_pattern", 6)) else "full"
    if family in ("qwen2", "qwen3"):
        return "sliding" if index >= fields.integer("max_window_layers", 28) else "full"
    return "sliding"


def _ropes(fields: Fields, two: bool) -> tuple[Rope, Rope | None]:
    """Of layers that see everything and, with `two`, of those with a window."""
    theta = fields.get("rope_theta", 10000.0)
    if not two:
        # As in transformers, the original context goes first that is not with the other rope parameters.
        section = _rope_section(fields)
        if _ORIGINAL in fields:
            section = {**section, _ORIGINAL: fields.get(_ORIGINAL)}
        return _rope(fields, section, theta), None
    kinds = fields.inner(fields.section("rope_parameters"), f"the rope parameters of {CONFIG}")
    full = {**kinds.section("full_attention"), **fields.section("rope_scaling")}
    local = kinds.section("sliding_attention")
    return _rope(fields, full, theta), _rope(fields, local, fields.get("rope_local_base_freq"))


def _rope_section(fields: Fields) -> dict[str, Any]:
    """The old key is what model cards tell people to add, and goes before the new one."""
    return fields.section("rope_scaling") or fields.section("rope_parameters")


def _rope(fields: Fields, plain: dict[str, Any], theta: object) -> Rope:
    rope = fields.inner({"rope_theta": theta, **plain}, f"the rope parameters of {CONFIG}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("llama_4_scaling_beta"):  # Ministral 3 has it; no family here computes it
        raise fields.refuse("a scaling of queries by their position (llama_4_scaling_beta)")
    if kind == "default":
        return Rope(rope.positive("rope_theta"))
    if kind == "linear":
        return Rope(rope.positive("rope_theta"), factor=rope.positive("factor"))
    if kind == "yarn":
        return _yarn(fields, rope)
    if kind in ("dynamic", "longrope"):
        raise fields.refuse(f"the rope type {kind!r}, whose angles change with the length of the text,")
    if kind != "llama3":
        raise fields.refuse(f"the rope type {kind!r} (default, linear, llama3 and yarn are)")
    return Rope(
        rope.positive("rope_theta"),
        Llama3Scaling(
            rope.positive("factor"),
            rope.positive("low_freq_factor"),
            rope.positive("high_freq_factor"),
            rope.size(_ORIGINAL, fields.size("max_position_embeddings")),
        ),
    )


def _yarn(fields: Fields, rope: Fields) -> Rope:
    """Where the original context is left out, it is the model's. A file that has it may leave out the factor,
    which is then what is between the two."""
    stated = fields.size("max_position_embeddings")
    original = rope.size(_ORIGINAL, stated)
    ratio = stated / original if _ORIGINAL in rope else None
    factor = rope.number("factor", ratio, above=LEAST_TURNS, most=MOST / original)
    slow = rope.number("beta_slow", 1.0, above=LEAST_TURNS)
    fast = rope.number("beta_fast", 32.0, above=slow)
    # Either of the two scales counts only beside the other one, and 0 is none.
    scales = [rope.positive(key) for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    attention = yarn_attention(factor, *scales) if len(scales) == 2 else yarn_attention(factor)
    return Rope(
        rope.number("rope_theta", above=1),
        yarn=YarnScaling(factor, original, fast, slow, rope.flag("truncate", True)),
        attention=rope.positive("attention_factor", attention),
    )


def _rotary_dim(fields: Fields, width: int, partial: bool) -> int:
    """0 for the whole head, which is all that families know that are not `partial`."""
    inside = fields.inner(_rope_section(fields), f"the rope parameters of {CONFIG}")
    factor = inside.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    if factor == 1.0:
        return 0
    if not partial or not 0 < factor < 1:
        raise fields.refuse(f"a rotary embedding of a part of the head ({factor})")
    return int(width * factor)


def _embedding_scale(checkpoint: Checkpoint, name: str, hidden: int) -> float:
    """sqrt(hidden) in the type of the table, in which the model was trained."""
    table = checkpoint.tensors.get(name)
    dtype = "F32" if table is None else table.dtype
    (bits,) = struct.unpack("<I", struct.pack("<f", hidden**0.5))
    if dtype == "BF16":
        bits = bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000  # round to nearest, ties to even
    scale: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    if dtype == "F16":
        scale = struct.unpack("<e", struct.pack("<e", scale))[0]
    return scale


def _delta(fields: Fields, family: str) -> DeltaShape:
    gate = fields.get("output_gate_type", "silu")
    if gate not in ("silu", "swish"):
        raise fields.refuse(f"the output gate {gate!r} (silu is)")
    return DeltaShape(
        key_heads=fields.size("linear_num_key_heads", most=MOST_PARTS),
        value_heads=fields.size("linear_num_value_heads", most=MOST_PARTS),
        key_width=fields.size("linear_key_head_dim"),
        value_width=fields.size("linear_value_head_dim"),
        kernel=fields.size("linear_conv_kernel_dim"),
        joined_qkvz=family == "qwen3_next",
        joined_ba=family == "qwen3_next",
    )


def _experts(
    fields: Fields, family: str, layers: int, checkpoint: Checkpoint, prefix: str
) -> tuple[ExpertsShape | None, tuple[int, ...]]:
    """And the layers that have none all the same. `prefix` is what the names of layers' tensors begin with:
    the experts of what predicts further tokens may be stored in another way."""
    if family not in WITH_EXPERTS:
        return None, ()
    count = fields.integer("num_experts", fields.integer("num_local_experts", 0), most=MOST_PARTS)
    if not count:
        return None, ()
    plain = set(fields.integers("mlp_only_layers"))
    every = max(1, fields.integer("decoder_sparse_step", 1))
    ours = (name for name in checkpoint.tensors if name.startswith(prefix))
    fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in ours)
    shape = ExpertsShape(
        count=count,
        active=fields.size("num_experts_per_tok"),
        intermediate=fields.size("moe_intermediate_size"),
        normalised=family == "qwen3_5_moe" or fields.flag("norm_topk_prob"),
        shared_intermediate=0 if family == "qwen3_moe" else fields.integer("shared_expert_intermediate_size"),
        stored="fused" if fused else "each",
    )
    return shape, tuple(i for i in range(layers) if i in plain or (i + 1) % every)
