"""The shape of a model from the metadata of a GGUF file, and from which tensors are there.

Keys as in ggml's docs/gguf.md, section Models, and in gguf-py's constants.py; what no file says is as in
llama.cpp's src/models. Knows no torch.
"""

from __future__ import annotations

import math
import struct
from typing import Final

from cortex.neuron.models.fields import MOST, MOST_LAYERS, MOST_PARTS, Fields
from cortex.neuron.models.registry import HYBRID, WITH_EXPERTS, family_name
from cortex.neuron.models.shape import (
    LEAST_TURNS,
    DeltaShape,
    ExpertsShape,
    Kind,
    ModelShape,
    Rope,
    YarnScaling,
    yarn_attention,
)
from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.wire.errors import LoadFailed

FREQUENCY_FACTORS: Final = "rope_freqs.weight"
"""The tensor in which GGUF files carry Llama 3.1's rope scaling: a divisor for each pair."""
_GEMMA_27B_LAYERS: Final = 62
"""Of the one Gemma 3 whose queries are not divided by the root of the head's width."""


def shape_from_gguf(checkpoint: Checkpoint) -> ModelShape:
    """Raises LoadFailed."""
    fields = Fields(checkpoint.path, checkpoint.metadata, f"{checkpoint.architecture}.", "the metadata")
    family = family_name(checkpoint.architecture)
    tensors = checkpoint.tensors
    table = tensors.get("token_embd.weight")
    if table is None:
        raise LoadFailed(f"{checkpoint.path} lacks tensor token_embd.weight.")
    # The blocks for predicting further tokens come last and are no part of the model.
    blocks = fields.size("block_count", most=MOST_LAYERS)
    layers = blocks - fields.integer("nextn_predict_layers", 0, most=blocks - 1)
    kinds = _kinds(fields, family, layers)
    attend = [kind != "delta" for kind in kinds] or [True] * layers
    heads = fields.size_of_layers("attention.head_count", attend, most=MOST_PARTS)
    kv_heads = fields.size_of_layers("attention.head_count_kv", attend, heads, most=MOST_PARTS)
    hidden = fields.size("embedding_length")
    width = fields.size("attention.key_length", hidden // heads)
    if fields.size("attention.value_length", width) != width:
        raise fields.refuse("a value width that differs from the key width")
    rotary = fields.size("rope.dimension_count", width)
    if rotary != width and family not in HYBRID:
        raise fields.refuse("a rotary embedding of a part of the head")
    experts = _experts(fields, family, checkpoint)
    intermediate = fields.size_of_layers(
        "feed_forward_length", [experts is None] * layers, experts.intermediate if experts else None
    )
    rope = _rope(fields, checkpoint, width)
    is_gemma = family == "gemma3"
    first_full = kinds.index("full") if "full" in kinds else 0
    return ModelShape(
        architecture=checkpoint.architecture,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=width,
        intermediate=intermediate,
        vocab=table.shape[0],
        max_position=rope.context(fields.size("context_length")),
        rope=rope,
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tied="output.weight" not in tensors,
        qkv_bias=f"blk.{first_full}.attn_q.bias" in tensors,
        output_bias=f"blk.{first_full}.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        activation="gelu_tanh" if is_gemma else "silu",
        rotary_dim=0 if rotary == width else rotary,
        qk_norm=f"blk.{first_full}.attn_q_norm.weight" in tensors,
        gated=family in HYBRID,
        post_norms=is_gemma,
        kinds=kinds,
        window=fields.size("attention.sliding_window") if "sliding" in kinds else None,
        local_rope=_local_rope(fields) if "sliding" in kinds else None,
        query_scale=_query_scale(hidden, heads, width, layers) if is_gemma else None,
        embedding_scale=hidden**0.5 if is_gemma else None,
        logit_cap=fields.positive("final_logit_softcapping") if "final_logit_softcapping" in fields else None,
        delta=_delta(fields, family, checkpoint) if "delta" in kinds else None,
        experts=experts,
    )


def _query_scale(hidden: int, heads: int, width: int, layers: int) -> float:
    return 1 / math.sqrt(hidden / heads if layers == _GEMMA_27B_LAYERS else width)


def _kinds(fields: Fields, family: str, layers: int) -> tuple[Kind, ...]:
    """Empty where all layers attend to everything."""
    if family in HYBRID:
        every = max(1, fields.integer("full_attention_interval", 4))
        return tuple("delta" if (index + 1) % every else "full" for index in range(layers))
    if family != "gemma3" or "attention.sliding_window" not in fields:
        return ()
    pattern = fields.get("attention.sliding_window_pattern", 6)
    if isinstance(pattern, list):
        if len(pattern) != layers:
            raise fields.refuse(f"a sliding_window_pattern of {len(pattern)} for {layers} layers")
        return tuple("sliding" if windowed else "full" for windowed in pattern)
    if type(pattern) is not int or pattern < 1:
        raise fields.refuse(f"the sliding_window_pattern {pattern!r}")
    return tuple("sliding" if (index + 1) % pattern else "full" for index in range(layers))


def _rope(fields: Fields, checkpoint: Checkpoint, width: int) -> Rope:
    theta = fields.positive("rope.freq_base", 10000.0)
    divisors = _frequency_factors(checkpoint, width)
    old = fields.number("rope.scale_linear", 0.0)  # as older converters call the factor
    factor = fields.number("rope.scaling.factor", old)
    scaling = fields.get("rope.scaling.type", "linear" if factor else "none")
    if scaling == "linear":
        factor = fields.positive("rope.scaling.factor", old or 1.0)
        return Rope(theta, divisors=divisors, factor=factor, attention=_attention(fields))
    if scaling == "yarn":
        return _yarn(fields, divisors, old or 1.0)
    if scaling == "longrope":
        raise fields.refuse("the rope scaling 'longrope', whose angles change with the length of the text,")
    if scaling != "none":
        raise fields.refuse(f"the rope scaling {scaling!r} (none, linear and yarn are)")
    return Rope(theta, divisors=divisors, attention=_attention(fields))


def _local_rope(fields: Fields) -> Rope:
    return Rope(fields.positive("rope.freq_base_swa", 10000.0), attention=_attention(fields))


def _attention(fields: Fields) -> float:
    """Of every scaling, YaRN's own comes on top."""
    return fields.positive("rope.scaling.attn_factor", 1.0)


def _yarn(fields: Fields, divisors: tuple[float, ...], factor: float) -> Rope:
    """`factor` is for a file that states none. As in llama.cpp a yarn_attn_factor in the file counts for
    nothing: it is computed. The bounds it reads for some architectures; its converter writes them for all.
    """
    original = fields.size("rope.scaling.original_context_length", fields.size("context_length"))
    factor = fields.number("rope.scaling.factor", factor, above=LEAST_TURNS, most=MOST / original)
    slow = fields.number("rope.scaling.yarn_beta_slow", 1.0, above=LEAST_TURNS)
    fast = fields.number("rope.scaling.yarn_beta_fast", 32.0, above=slow)
    kept = fields.number("rope.scaling.yarn_ext_factor", -1.0)  # below 0 it is not set, and 1 then
    if kept >= 0 and kept != 1:
        raise fields.refuse(f"a YaRN extrapolation factor of {kept}")
    multiplier = "rope.scaling.yarn_log_multiplier"
    scale = fields.positive(multiplier) if fields.get(multiplier) else 0.0
    return Rope(
        fields.number("rope.freq_base", 10000.0, above=1),
        divisors=divisors,
        yarn=YarnScaling(factor, original, fast, slow),
        attention=yarn_attention(factor, 1.0, scale) * _attention(fields),
    )


def _frequency_factors(checkpoint: Checkpoint, width: int) -> tuple[float, ...]:
    tensor = checkpoint.tensors.get(FREQUENCY_FACTORS)
    if tensor is None:
        return ()
    if tensor.dtype != "F32" or tensor.shape != (width // 2,) or tensor.rows > MOST_PARTS:
        raise LoadFailed(f"{checkpoint.path}: tensor {tensor.name} is not fp32 of {width // 2} pairs.")
    return struct.unpack(f"<{width // 2}f", checkpoint.rows(tensor.name, 0, tensor.rows))


def _delta(fields: Fields, family: str, checkpoint: Checkpoint) -> DeltaShape:
    """Files of Qwen3-Next have b and alpha joined, older ones q, k, v and z too."""
    value_heads = fields.size("ssm.time_step_rank", most=MOST_PARTS)
    values = fields.size("ssm.inner_size")
    if values % value_heads:
        raise fields.refuse(f"{values} elements of {value_heads} value heads")
    is_next = family == "qwen3_next"
    return DeltaShape(
        key_heads=fields.size("ssm.group_count", most=MOST_PARTS),
        value_heads=value_heads,
        key_width=fields.size("ssm.state_size"),
        value_width=values // value_heads,
        kernel=fields.size("ssm.conv_kernel"),
        tiled=not is_next,
        joined_qkvz=is_next and any(name.endswith(".ssm_in.weight") for name in checkpoint.tensors),
        joined_ba=is_next,
    )


def _experts(fields: Fields, family: str, checkpoint: Checkpoint) -> ExpertsShape | None:
    count = fields.integer("expert_count", 0, most=MOST_PARTS)
    if not count:
        return None
    if family not in WITH_EXPERTS:
        raise fields.refuse("a mixture of experts")
    tensors = checkpoint.tensors
    gates = [tensor for name, tensor in tensors.items() if name.endswith(".ffn_gate_inp_shexp.weight")]
    return ExpertsShape(
        count=count,
        active=fields.size("expert_used_count"),
        intermediate=fields.size("expert_feed_forward_length"),
        normalised=fields.flag("expert_weights_norm", True),
        shared_intermediate=fields.size("expert_shared_feed_forward_length") if gates else 0,
        stored="fused" if any(".ffn_gate_up_exps." in name for name in tensors) else "stacked",
        flat_gate=bool(gates) and len(gates[0].shape) == 1,
    )
