"""What an engine must do as transformers does it, and could easily do otherwise; a test for each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cortex.neuron.models.decoder import frequencies
from cortex.neuron.models.shape import Rope
from cortex.neuron.nn.rotary import rotations
from cortex.wire.errors import LoadFailed

pytestmark = pytest.mark.slow

IDS = torch.randint(0, 199, (90,), generator=torch.Generator().manual_seed(3)).tolist()
Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def rewrite(source: Path, target: Path, change: Change = dict, **config: Any) -> Path:
    """The same checkpoint in one file, its tensors and its configuration changed; None takes a key away."""
    tensors = {name: t for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    said = {**json.loads((source / "config.json").read_text()), **config}
    target.mkdir()
    (target / "config.json").write_text(json.dumps({k: v for k, v in said.items() if v is not None}))
    save_file({name: t.contiguous() for name, t in change(tensors).items()}, target / "model.safetensors")
    return target


def difference(made: Any, expected: Tensor) -> float:
    found = made.in_chunks(IDS, [70] + 20 * [1])
    return float((found.log_softmax(-1) - expected.log_softmax(-1)).abs().max())


# --- rope -----------------------------------------------------------------------------------------


def test_angles_are_products_in_fp32() -> None:
    """Exact angles would differ visibly at 30,000 tokens."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    positions = torch.tensor([0, 1, 700, 4095, 30000])
    cos, sin = LlamaRotaryEmbedding(LlamaConfig(head_dim=64))(torch.zeros(1), positions.unsqueeze(0))
    found = rotations(positions, frequencies(Rope(10000.0), 64)).squeeze(1)
    assert torch.equal(found.real, cos[0, :, :32])
    assert torch.equal(found.imag, sin[0, :, :32])
    exact = positions.double().unsqueeze(1) * 10000.0 ** -(torch.arange(0, 64, 2).double() / 64)
    assert (found.real - exact.cos()).abs().max() > 1e-4


def test_rope_keys_of_gemma_may_be_in_the_old_style(
    make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny("gemma3_text")
    old = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0, "layer_types": None}
    path = rewrite(tiny.directory, tmp_path / "old", rope_parameters=None, sliding_window_pattern=2, **old)
    assert difference(computing(path), tiny.logits(IDS)) <= 3e-4


def test_large_gemmas_scale_the_rope_of_layers_without_window_only(
    make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000000.0}
    local = {"rope_type": "default", "rope_theta": 10000.0}
    tiny = make_tiny("gemma3_text", rope_parameters={"full_attention": full, "sliding_attention": local})
    assert difference(computing(tiny.directory), tiny.logits(IDS)) <= 3e-4
    path = rewrite(
        tiny.directory,
        tmp_path / "old",
        rope_parameters=None,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert difference(computing(path), tiny.logits(IDS)) <= 3e-4


@pytest.mark.parametrize("kind", ["llama", "qwen3_5_text", "gemma3_text"])
def test_a_scaling_beside_rope_parameters_counts_as_in_transformers(
    kind: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    scaling = {"rope_type": "linear", "factor": 4.0}
    path = rewrite(make_tiny(kind).directory, tmp_path / "both", rope_scaling=scaling)
    with torch.inference_mode():
        expected = AutoModelForCausalLM.from_pretrained(path).eval()(torch.tensor([IDS])).logits[0]
    assert difference(computing(path), expected) <= 1e-3
    assert difference(computing(make_tiny(kind).directory), expected) > 0.1


# --- heads and tables -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_head_in_the_file_wins_over_a_flag_that_ties_it(
    kind: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny(kind, tie_word_embeddings=False)
    path = rewrite(tiny.directory, tmp_path / "flagged", tie_word_embeddings=True)
    assert difference(computing(path), tiny.logits(IDS)) <= 3e-4


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_a_tied_table_may_be_stored_as_the_head(
    kind: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    """As `save_model` of safetensors does, which keeps one of the names that share their memory."""
    tiny = make_tiny(kind, tie_word_embeddings=True)

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
        return tensors

    made = computing(rewrite(tiny.directory, tmp_path / "head", rename))
    assert made.shape.tied
    assert difference(made, tiny.logits(IDS)) <= 3e-4


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.bfloat16, 6.9375), (torch.float16, 6.9296875), (torch.float32, 48**0.5)]
)
def test_gemmas_embedding_scale_has_the_precision_of_the_weights(
    dtype: torch.dtype, scale: float, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny("gemma3_text")

    def halve(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(dtype) for name, tensor in tensors.items()}

    found = computing(rewrite(tiny.directory, tmp_path / "halved", halve)).shape.embedding_scale
    assert found == pytest.approx(scale, rel=1e-7)
    assert found == pytest.approx(float(torch.tensor(48**0.5).to(dtype)), rel=1e-7)


def test_gemma_caps_its_logits_and_not_its_attention(
    make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny("gemma3_text", attn_logit_softcapping=1.0, final_logit_softcapping=2.0)
    assert difference(computing(tiny.directory), tiny.logits(IDS)) <= 3e-4
    assert computing(tiny.directory).in_chunks(IDS, [90]).abs().max() <= 2.0
    path = rewrite(tiny.directory, tmp_path / "other", attn_logit_softcapping=50.0)
    assert difference(computing(path), tiny.logits(IDS)) <= 3e-4


# --- experts --------------------------------------------------------------------------------------


def fuse(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Experts stacked, gate rows before up rows, as files of Qwen 3.5 have them."""
    fused = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    for layer in {name.partition("experts.")[0] for name in tensors if ".experts." in name}:
        gate, up, down = (
            torch.stack([tensors[f"{layer}experts.{index}.{part}_proj.weight"] for index in range(6)])
            for part in ("gate", "up", "down")
        )
        fused[f"{layer}experts.gate_up_proj"] = torch.cat((gate, up), 1)
        fused[f"{layer}experts.down_proj"] = down
    return fused


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_5_moe_text"])
def test_experts_may_be_fused_into_one_tensor(
    kind: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny(kind)
    each, fused = computing(tiny.directory), computing(rewrite(tiny.directory, tmp_path / "fused", fuse))
    assert (each.shape.experts.stored, fused.shape.experts.stored) == ("each", "fused")
    assert torch.equal(each.in_chunks(IDS, [90]), fused.in_chunks(IDS, [90]))


@pytest.mark.parametrize(
    ("kind", "assumed"), [("qwen3_moe", False), ("qwen3_next", True), ("qwen3_5_moe_text", True)]
)
def test_whether_weights_of_experts_sum_to_one_depends_on_the_family(
    kind: str, assumed: bool, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny(kind)
    path = rewrite(tiny.directory, tmp_path / "silent", norm_topk_prob=None)
    assert computing(path).shape.experts.normalised is assumed
    path = rewrite(tiny.directory, tmp_path / "denied", norm_topk_prob=False)
    assert computing(path).shape.experts.normalised is (kind == "qwen3_5_moe_text")
    assert difference(computing(tiny.directory), tiny.logits(IDS)) <= 1e-3


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_the_number_of_experts_has_two_names(
    key: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny("qwen3_moe")
    names: dict[str, Any] = {"num_experts": None, "num_local_experts": None, key: 6}
    assert computing(rewrite(tiny.directory, tmp_path / "named", **names)).shape.experts.count == 6


@pytest.mark.parametrize("kind", ["qwen3_moe", "qwen3_next", "qwen3_5_moe_text"])
def test_no_router_of_the_tiny_models_is_near_a_tie(kind: str, make_tiny: Callable[..., Any]) -> None:
    """At one, rounding could choose another expert, and a comparison would show nothing."""
    tiny = make_tiny(kind)
    with torch.inference_mode():
        routed = tiny.model(torch.tensor([IDS]), output_router_logits=True).router_logits
    assert len(routed) == 3
    for logits in routed:
        best = logits.softmax(-1).topk(3).values
        assert (best[:, 1] - best[:, 2]).min() > 2e-6


# --- sizes ----------------------------------------------------------------------------------------

KINDS = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"]
KINDS += ["qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("kind", [*KINDS, "fused"])
def test_no_tensor_may_be_larger_than_the_configuration_says(
    kind: str,
    world: int,
    make_tiny: Callable[..., Any],
    unnoticed_sizes: Callable[[Path, int], set[tuple[str, int]]],
    tmp_path: Path,
) -> None:
    """What is cut out of one would compute something, and nobody would be told."""
    path = make_tiny("qwen3_moe" if kind == "fused" else kind).directory
    if kind == "fused":
        path = rewrite(path, tmp_path / "fused", fuse)
    assert unnoticed_sizes(path, world) == set()


@pytest.mark.parametrize(
    ("kind", "config", "tensor"),
    [
        ("llama", {"vocab_size": 150}, "embed_tokens.weight"),
        ("llama", {"intermediate_size": 64}, "mlp.gate_proj.weight"),
        ("llama", {"num_key_value_heads": 1}, "self_attn.k_proj.weight"),
        ("qwen3_5_text", {"linear_num_value_heads": 4}, "linear_attn.in_proj_qkv.weight"),
    ],
)
def test_a_configuration_of_a_smaller_model_is_refused_as_transformers_refuses_it(
    kind: str,
    config: dict[str, int],
    tensor: str,
    make_tiny: Callable[..., Any],
    computing: Any,
    tmp_path: Path,
) -> None:
    from transformers import AutoModelForCausalLM

    path = rewrite(make_tiny(kind).directory, tmp_path / "smaller", **config)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(path)
    with pytest.raises(LoadFailed, match=rf"model\.safetensors: tensor .*{tensor} has the shape .* asks for"):
        computing(path)


@pytest.mark.parametrize("kind", ["qwen3_next", "qwen3_5_text"])
def test_attention_of_hybrid_families_is_gated_whatever_a_flag_says(
    kind: str, make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    """transformers knows no such flag."""
    tiny = make_tiny(kind)
    path = rewrite(tiny.directory, tmp_path / "flagged", attn_output_gate=False)
    assert difference(computing(path), tiny.logits(IDS)) <= 1e-3


# --- text parts of models that see ----------------------------------------------------------------


@pytest.fixture(scope="module")
def seeing(make_tiny: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A model of text and images as transformers saves it, with the text model's weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    sizes = {"hidden_size": 16, "intermediate_size": 16}
    eyes: dict[str, dict[str, int]] = {
        "gemma3": {"num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "qwen3_5": {"depth": 1, "num_heads": 2, "out_hidden_size": 48, "num_position_embeddings": 16},
    }
    eyes["qwen3_5_moe"] = eyes["qwen3_5"]

    def make(kind: str) -> Any:
        tiny = make_tiny(f"{kind}_text")
        text = tiny.model.config.to_dict()
        config = AutoConfig.for_model(
            kind,
            text_config=text,
            vision_config={**sizes, **eyes[kind]},
            tie_word_embeddings=text["tie_word_embeddings"],
        )
        model = AutoModelForImageTextToText.from_config(config).eval()
        model.model.language_model.load_state_dict(tiny.model.model.state_dict())
        model.lm_head.load_state_dict(tiny.model.lm_head.state_dict())
        directory = tmp_path_factory.mktemp(kind)
        model.save_pretrained(directory, max_shard_size="60KB")
        return tiny._replace(directory=directory)

    return make


@pytest.mark.parametrize("kind", ["gemma3", "qwen3_5", "qwen3_5_moe"])
def test_of_a_model_that_sees_the_text_part_is_loaded(
    kind: str, seeing: Callable[[str], Any], computing: Any
) -> None:
    tiny = seeing(kind)
    assert json.loads((tiny.directory / "config.json").read_text())["model_type"] == kind
    assert difference(computing(tiny.directory), tiny.logits(IDS)) <= 1e-3


def test_gemmas_names_may_begin_in_three_ways(
    seeing: Callable[[str], Any], computing: Any, tmp_path: Path
) -> None:
    tiny = seeing("gemma3")

    def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            name.replace("language_model.model.", "model.language_model."): t for name, t in tensors.items()
        }

    first, second = computing(tiny.directory), computing(rewrite(tiny.directory, tmp_path / "new", rename))
    prefixes = (first.shape.prefix, second.shape.prefix)
    assert prefixes == ("language_model.model.", "model.language_model.")
    assert torch.equal(first.in_chunks(IDS, [90]), second.in_chunks(IDS, [90]))


def test_what_predicts_further_tokens_is_skipped_by_its_name(
    make_tiny: Callable[..., Any], computing: Any, tmp_path: Path
) -> None:
    tiny = make_tiny("qwen3_5_text")

    def more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**tensors, "mtp.fc.weight": torch.zeros(48, 96), "mtp.norm.weight": torch.zeros(48)}

    path = rewrite(tiny.directory, tmp_path / "more", more, mtp_num_hidden_layers=1)
    assert difference(computing(path), tiny.logits(IDS)) <= 1e-3
