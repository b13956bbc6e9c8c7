"""A tiny llama on disk, without transformers: enough for everything but parity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, LAYERS, CONTEXT = 97, 32, 4, 2, 8, 48, 2, 2048


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    config = {
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens": (VOCAB, HIDDEN),
        "model.norm": (HIDDEN,),
        "lm_head": (VOCAB, HIDDEN),
    }
    for index in range(LAYERS):
        layer = f"model.layers.{index}."
        shapes |= {
            f"{layer}input_layernorm": (HIDDEN,),
            f"{layer}post_attention_layernorm": (HIDDEN,),
            f"{layer}self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
            f"{layer}self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
            f"{layer}self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
            f"{layer}mlp.gate_proj": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.up_proj": (INTERMEDIATE, HIDDEN),
            f"{layer}mlp.down_proj": (HIDDEN, INTERMEDIATE),
        }
    chance = torch.Generator().manual_seed(11)
    tensors = {f"{name}.weight": 0.4 * torch.randn(shape, generator=chance) for name, shape in shapes.items()}
    save_file(tensors, directory / "model.safetensors")
    return directory
