"""Tiny random models made by transformers, which is the reference, and saved in both formats."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

VOCAB = 199


class Tiny(NamedTuple):
    """`directory` holds it as sharded safetensors with config.json."""

    directory: Path
    model: Any

    def logits(self, ids: list[int]) -> Tensor:
        """The reference's, fp32 [len(ids), VOCAB]."""
        with torch.inference_mode():
            found: Tensor = self.model(torch.tensor([ids])).logits[0]
        return found


@pytest.fixture(scope="module")
def make_tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}

    def make(kind: str, **options: Any) -> Tiny:
        config_kind, model_kind = kinds[kind]
        config = config_kind(
            **{
                "vocab_size": VOCAB,
                "hidden_size": 48,
                "intermediate_size": 80,
                "num_hidden_layers": 3,
                "num_attention_heads": 6,
                "num_key_value_heads": 2,
                "max_position_embeddings": 256,
                "initializer_range": 0.2,
                **options,
            }
        )
        torch.manual_seed(5)
        model = model_kind(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.5, 1.5)
                if name.endswith("bias"):
                    parameter.normal_(0, 0.5)
        directory = tmp_path_factory.mktemp(kind)
        model.save_pretrained(directory, max_shard_size="60KB")
        assert len(list(directory.glob("*.safetensors"))) > 1
        return Tiny(directory, model)

    return make
