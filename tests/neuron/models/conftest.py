"""Tiny random models made by transformers, which is the reference, and saved in both formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cortex.neuron.models.llama import build
from cortex.neuron.models.shape import ModelShape, Rope
from cortex.neuron.nn.placement import Dtype, Placement

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


# --- a CUDA device that is not there --------------------------------------------------------------


@pytest.fixture(scope="session")
def cuda_shape() -> ModelShape:
    return ModelShape(
        architecture="qwen2",
        layers=2,
        hidden=48,
        heads=6,
        kv_heads=2,
        head_dim=8,
        intermediate=80,
        vocab=199,
        max_position=256,
        rope=Rope(10000.0),
        norm_eps=1e-6,
        tied=True,
        qkv_bias=True,
        output_bias=False,
        mlp_bias=False,
    )


@pytest.fixture(scope="module")
def fake_model(cuda_shape: ModelShape) -> Iterator[Callable[[Dtype], Any]]:
    """Makes filled models on it; under the mode that makes all tensors fake."""
    device = torch.device("cuda", 0)

    def make(dtype: Dtype) -> Any:
        model = build(cuda_shape, Placement(device, dtype))
        for module in model.modules():
            parameters: Mapping[str, Tensor] = dict(module.named_parameters(recurse=False))
            if parameters:
                host = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in parameters.items()}
                filled: Any = module
                filled.fill(host)
        assert all(parameter.device == device for parameter in model.parameters())
        return model

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode():
        # A build without CUDA has no device guard, which the method asks for and the operator does not.
        copy = torch.ops.aten.copy_.default
        patch.setattr(torch.Tensor, "copy_", lambda target, source: copy(target, source))
        yield make
