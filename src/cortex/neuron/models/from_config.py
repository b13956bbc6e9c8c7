"""The shape of a model from config.json, as transformers writes it, in the old and the new style.

Keys and defaults as in transformers' configuration classes. Knows no torch.
"""

from __future__ import annotations

from cortex.neuron.models.fields import Fields
from cortex.neuron.models.shape import Llama3Scaling, ModelShape, Rope
from cortex.neuron.weights.checkpoint import CONFIG, Checkpoint
from cortex.wire.errors import LoadFailed


def shape_from_config(checkpoint: Checkpoint) -> ModelShape:
    """Raises LoadFailed."""
    fields = Fields(checkpoint.path, checkpoint.config, "", CONFIG)
    is_qwen2 = checkpoint.architecture == "qwen2"
    if "quantization_config" in fields:
        method = fields.get("quantization_config")
        name = method.get("quant_method", "unnamed") if isinstance(method, dict) else method
        raise fields.refuse(f"the quantization {name!r}")
    if fields.get("hidden_act", "silu") != "silu":
        raise fields.refuse(f"the activation {fields.get('hidden_act')!r}")
    heads = fields.integer("num_attention_heads")
    hidden = fields.integer("hidden_size")
    tied = "lm_head.weight" not in checkpoint.tensors
    if tied and not fields.flag("tie_word_embeddings"):
        raise LoadFailed(f"{checkpoint.path} lacks tensor lm_head.weight, and {CONFIG} ties no embeddings.")
    longest = fields.integer("max_position_embeddings")
    if fields.flag("use_sliding_window") and "sliding_window" in fields:
        longest = min(longest, fields.integer("sliding_window"))  # up to there no window shows
    return ModelShape(
        architecture=checkpoint.architecture,
        layers=fields.integer("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=fields.integer("head_dim", hidden // max(1, heads)),
        intermediate=fields.integer("intermediate_size"),
        vocab=fields.integer("vocab_size"),
        max_position=longest,
        rope=_rope(fields),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        tied=tied,
        qkv_bias=is_qwen2 or fields.flag("attention_bias"),
        output_bias=not is_qwen2 and fields.flag("attention_bias"),
        mlp_bias=not is_qwen2 and fields.flag("mlp_bias"),
    )


def _rope(fields: Fields) -> Rope:
    plain = fields.section("rope_parameters") or fields.section("rope_scaling")
    theta = plain.get("rope_theta", fields.get("rope_theta", 10000.0))
    rope = fields.inner({**plain, "rope_theta": theta}, f"the rope parameters of {CONFIG}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise fields.refuse("a rotary embedding of a part of the head")
    if kind == "default":
        return Rope(rope.number("rope_theta"))
    if kind != "llama3":
        raise fields.refuse(f"the rope type {kind!r} (default and llama3 are)")
    return Rope(
        rope.number("rope_theta"),
        Llama3Scaling(
            rope.number("factor"),
            rope.number("low_freq_factor"),
            rope.number("high_freq_factor"),
            rope.integer("original_max_position_embeddings"),
        ),
    )
