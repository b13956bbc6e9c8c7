"""The node's tiny llama, for tests that load it without a node, and random models of other architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

VOCAB = 199


@pytest.fixture(scope="session")
def tiny_model(models_dir: Path) -> Path:
    return models_dir / "tiny"


@pytest.fixture(scope="session")
def write_random(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Has transformers write a random model, by the name that its configurations have for the kind."""
    from transformers import AutoConfig, AutoModelForCausalLM

    def write(kind: str, **options: Any) -> Path:
        config = AutoConfig.for_model(
            kind,
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
            },
        )
        torch.manual_seed(5)
        directory = tmp_path_factory.mktemp(kind)
        AutoModelForCausalLM.from_config(config).save_pretrained(directory)
        return directory

    return write
