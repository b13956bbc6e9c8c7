from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from cortex.hookspecs import LoadOrder
from cortex.neuron import torch_engine
from cortex.neuron.models.division import rank_weight_bytes
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.torch_engine import PROCESS_BYTES, TorchFactory, check_quant, open_codec
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.wire.errors import BadRequest, LoadFailed

MIB = 2**20


def order(path: Path, **more: Any) -> LoadOrder:
    return LoadOrder(model_id="m", path=str(path), **more)


@pytest.fixture
def tiny(models_dir: Path) -> Path:
    return models_dir / "tiny"


@pytest.fixture
def quantised(tmp_path: Path) -> Path:
    """A GGUF file whose one big tensor is Q4_0."""
    path = tmp_path / "some-model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    blocks = gguf.quants.quantize(np.zeros((64, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q4_0)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_plan_is_weights_two_contexts_and_the_process(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        shape = read_shape(checkpoint)
    for dtype in ("packed16", "int8", "int4", "float32"):
        device = "GPU-a" if dtype == "int4" else "cpu"
        plan = TorchFactory().plan(order(tiny, dtype=dtype, devices=(device,)))
        cache = 2 * shape.max_position * shape.kv_bytes_per_token
        assert plan.bytes_per_device == {device: shape.weight_bytes(dtype) + cache + PROCESS_BYTES}
        assert plan.limit.context == plan.limit.input == plan.limit.output == shape.max_position
        assert (plan.detail.dtype, plan.detail.cache_tokens) == (dtype, 2 * shape.max_position)


def test_a_plan_has_states_for_all_who_run_and_for_those_that_are_kept(make_tiny: Callable[..., Any]) -> None:
    path = make_tiny("qwen3_5_text").directory
    with open_checkpoint(path) as checkpoint:
        shape = read_shape(checkpoint)
    state = shape.state_bytes
    assert state == 4 * 2 * (6 * 8 * 12 + (2 * 2 * 8 + 6 * 12) * 3)
    sizes = {}
    for kept, changes in {
        0: {"prefix_cache": False},
        5: {"state_bytes": 6 * state - 1},
        40: {"state_bytes": 40 * state},
    }.items():
        plan = TorchFactory().plan(order(path, max_running=3, **changes))
        assert plan.detail.checkpoints == kept
        sizes[kept] = plan.bytes_per_device["cpu"]
    assert sizes[0] > 3 * state + PROCESS_BYTES + shape.weight_bytes("packed16")
    assert sizes[5] - sizes[0] == 5 * state
    assert sizes[40] - sizes[0] == 40 * state
    tight = order(path, memory_bytes=PROCESS_BYTES + 64 * MIB)
    assert TorchFactory().plan(tight).detail.checkpoints == tight.memory_bytes // 8 // state


@pytest.mark.parametrize("ranks", [1, 2])
def test_states_that_are_kept_lie_on_the_host_whatever_the_model_runs_on(
    make_tiny: Callable[..., Any], ranks: int
) -> None:
    path = make_tiny("qwen3_5_text").directory
    with open_checkpoint(path) as checkpoint:
        state = read_shape(checkpoint).state_bytes
    devices = tuple(f"GPU-{rank}" for rank in range(ranks))
    tight = order(path, devices=devices, memory_bytes=PROCESS_BYTES + 64 * MIB, state_bytes=10 * state)
    plan = TorchFactory().plan(tight)
    assert plan.detail.checkpoints == 10, "which are not taken from the device's budget"
    assert plan.bytes_per_device == {**dict.fromkeys(devices, tight.memory_bytes), "cpu": 10 * state}
    without = TorchFactory().plan(order(path, devices=devices, prefix_cache=False))
    assert list(without.bytes_per_device) == list(devices)


def test_ranks_that_hold_more_states_together_than_one_keep_no_more_than_is_allowed(
    make_tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_tiny("qwen3_5_text").directory
    with open_checkpoint(path) as checkpoint:
        whole = read_shape(checkpoint)
    monkeypatch.setattr(torch_engine, "largest_share", lambda shape, ranks: shape)
    devices = ("GPU-0", "GPU-1")
    plan = TorchFactory().plan(order(path, devices=devices, state_bytes=10 * whole.state_bytes))
    assert plan.detail.checkpoints == 5
    assert plan.bytes_per_device["cpu"] == 10 * whole.state_bytes


def test_states_are_kept_of_what_the_shortest_context_leaves(make_tiny: Callable[..., Any]) -> None:
    """A budget in which the model just fits keeps none, and it is not refused for them."""
    path = make_tiny("qwen3_5_text").directory
    with open_checkpoint(path) as checkpoint:
        state = read_shape(checkpoint).state_bytes
    with pytest.raises(BadRequest) as refusal:
        TorchFactory().plan(order(path, memory_bytes=MIB))
    needed = refusal.value.details["needed_bytes"]
    for kept in (0, 3):
        plan = TorchFactory().plan(order(path, memory_bytes=needed + kept * state))
        assert plan.detail.checkpoints == kept
        assert plan.limit.context == min(2048, plan.detail.cache_tokens)


def long_gemma(make_tiny: Callable[..., Any]) -> tuple[Path, ModelShape]:
    """Two of its three layers have a window of 24 tokens."""
    path = make_tiny("gemma3_text", sliding_window_pattern=3, max_position_embeddings=40_000).directory
    return path, read_shape_of(path)


def test_layers_with_a_window_keep_that_where_contexts_are_long(make_tiny: Callable[..., Any]) -> None:
    path, shape = long_gemma(make_tiny)
    near = shape.near_bytes_per_token
    assert 3 * near == 2 * shape.kv_bytes_per_token
    plan = TorchFactory().plan(order(path))
    assert plan.detail.windowed
    assert (plan.detail.cache_tokens, plan.detail.checkpoints) == (80_000, 32)
    cache = 80_000 * (shape.kv_bytes_per_token - near) + 8 * (24 + 512) * near + 32 * 24 * near
    assert plan.bytes_per_device == {"cpu": shape.weight_bytes("packed16") + cache + PROCESS_BYTES}
    few = TorchFactory().plan(order(path, state_bytes=5 * 24 * near, max_running=2))
    assert few.detail.checkpoints == 5
    assert TorchFactory().plan(order(path, prefix_cache=False)).detail.checkpoints == 0
    tight = order(path, memory_bytes=plan.bytes_per_device["cpu"], state_bytes=32 * 24 * near)
    assert TorchFactory().plan(tight).detail == plan.detail.__class__("packed16", 80_000, 32, True)
    short = make_tiny("gemma3_text", sliding_window_pattern=3).directory
    assert not TorchFactory().plan(order(short)).detail.windowed, "slots would be larger than the contexts"


def test_windows_are_kept_where_a_budget_is_good_for_more_tokens_then(make_tiny: Callable[..., Any]) -> None:
    path, shape = long_gemma(make_tiny)
    fixed = shape.weight_bytes("packed16") + PROCESS_BYTES
    slots = 8 * (24 + 512) * shape.near_bytes_per_token
    little = TorchFactory().plan(order(path, memory_bytes=fixed + slots + 1000 * shape.kv_bytes_per_token))
    assert not little.detail.windowed
    assert little.detail.cache_tokens > 3000
    budget = fixed + slots // 8 + 2100 * (shape.kv_bytes_per_token - shape.near_bytes_per_token)
    just = TorchFactory().plan(order(path, memory_bytes=budget, max_running=1, prefix_cache=False))
    assert just.detail.windowed, "with all rows it would not fit"
    assert just.limit.context == 2048, "of 2100, rounded"
    everyone = fixed + 8 * 40_000 * shape.kv_bytes_per_token
    assert not TorchFactory().plan(order(path, memory_bytes=everyone)).detail.windowed, (
        "there is room for all"
    )
    assert TorchFactory().plan(order(path, memory_bytes=everyone - 10**6)).detail.windowed
    much = TorchFactory().plan(order(path, memory_bytes=fixed + 20_000 * shape.kv_bytes_per_token))
    assert much.detail.windowed
    assert much.limit.context == 40_000
    assert much.detail.cache_tokens > 1.5 * 20_000


@pytest.mark.parametrize("option", ["cuda_paged", "cuda_graphs"])
def test_a_cache_in_pages_keeps_all_rows(make_tiny: Callable[..., Any], option: str) -> None:
    path, _ = long_gemma(make_tiny)
    gpu = order(path, devices=("GPU-a",))
    plan = TorchFactory().plan(gpu)
    assert plan.detail.windowed
    assert plan.bytes_per_device["cpu"] == 32 * 24 * read_shape_of(path).near_bytes_per_token
    assert not TorchFactory(options={option: True}).plan(gpu).detail.windowed
    assert TorchFactory(options={option: True}).plan(order(path)).detail.windowed, "there are none on CPUs"


def test_a_model_all_of_whose_layers_have_a_window_takes_no_more_with_its_context(
    make_tiny: Callable[..., Any],
) -> None:
    path = make_tiny("mistral", max_position_embeddings=40_000).directory
    shape = read_shape_of(path)
    plan = TorchFactory().plan(order(path, prefix_cache=False))
    fixed = shape.weight_bytes("packed16") + PROCESS_BYTES + 8 * (40 + 512) * shape.kv_bytes_per_token
    assert plan.bytes_per_device == {"cpu": fixed}
    within = TorchFactory().plan(order(path, memory_bytes=fixed, prefix_cache=False))
    assert (within.detail.windowed, within.detail.cache_tokens) == (True, 80_000)
    below = TorchFactory().plan(order(path, memory_bytes=fixed - 1, prefix_cache=False))
    assert not below.detail.windowed
    with pytest.raises(BadRequest, match="does not fit"):
        TorchFactory().plan(order(path, memory_bytes=PROCESS_BYTES))


def read_shape_of(path: Path) -> ModelShape:
    with open_checkpoint(path) as checkpoint:
        return read_shape(checkpoint)


def test_a_budget_is_taken_as_it_is_and_the_cache_gets_what_is_left(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        shape = read_shape(checkpoint)
    fixed = shape.weight_bytes("packed16") + PROCESS_BYTES
    budget = fixed + 3000 * shape.kv_bytes_per_token
    plan = TorchFactory().plan(order(tiny, memory_bytes=budget))
    assert plan.bytes_per_device == {"cpu": budget}
    assert plan.limit.context == plan.detail.cache_tokens == 2944, "whole multiples of 64 below 3000"
    wide = TorchFactory().plan(order(tiny, memory_bytes=fixed + 30000 * shape.kv_bytes_per_token))
    assert (wide.limit.context, wide.detail.cache_tokens) == (8192, 29952)


def test_a_budget_without_a_reasonable_context_is_refused_with_numbers(tiny: Path) -> None:
    with open_checkpoint(tiny) as checkpoint:
        shape = read_shape(checkpoint)
    with pytest.raises(BadRequest, match="does not fit into 384 MB") as refusal:
        TorchFactory().plan(order(tiny, memory_bytes=384 * MIB))
    needed = refusal.value.details["needed_bytes"]
    assert needed == shape.weight_bytes("packed16") + PROCESS_BYTES + 2048 * shape.kv_bytes_per_token
    assert TorchFactory().plan(order(tiny, memory_bytes=needed)).limit.context == 2048


def test_the_dtype_is_the_orders_else_the_configured_else_packed16(tiny: Path) -> None:
    assert TorchFactory().plan(order(tiny)).detail.dtype == "packed16"
    assert TorchFactory(dtype="float32").plan(order(tiny)).detail.dtype == "float32"
    assert TorchFactory(dtype="float32").plan(order(tiny, dtype="packed16")).detail.dtype == "packed16"


@pytest.mark.parametrize("quant", ["int8", "INT8"])
def test_a_quant_that_says_how_weights_are_held_goes_before_the_configured_dtype(
    tiny: Path, quant: str
) -> None:
    factory = TorchFactory(dtype="float32")
    assert factory.plan(order(tiny, quant=quant)).detail.dtype == "int8"
    assert factory.plan(order(tiny, quant=quant, dtype="int8")).detail.dtype == "int8"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"dtype": "packed16", "quant": "int8"}, "quant = 'int8' and dtype = 'packed16' contradict"),
        ({"dtype": "bf17"}, "no dtype 'bf17'; it is packed16, int8, int4, float32"),
        ({"dtype": "int4"}, "form int4 exists on GPUs only, and m would run on the processor"),
        ({"quant": "int4", "devices": ("cpu",) * 2}, "form int4 exists on GPUs only"),
        ({"dtype": "float32 "}, "no dtype 'float32 '"),
        ({"quant": "q4_k_m"}, "not of the quantisation 'q4_k_m'"),
        ({"devices": ("cpu",) * 3}, "2 KV heads can neither be divided among 3 ranks"),
        ({"devices": ("cpu",) * 8}, "4 heads cannot be divided among 8 ranks"),
    ],
)
def test_options_that_do_not_exist_are_refused(tiny: Path, more: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        TorchFactory().plan(order(tiny, **more))


@pytest.mark.parametrize("devices", [("GPU-a", "GPU-b"), ("cpu", "cpu")])
def test_ranks_have_a_share_of_weights_and_cache_each_and_a_process(
    tiny: Path, devices: tuple[str, ...]
) -> None:
    with open_checkpoint(tiny) as checkpoint:
        shape = read_shape(checkpoint)
    plan = TorchFactory().plan(order(tiny, devices=devices))
    cache = 2 * shape.max_position * shape.kv_bytes_per_token // 2
    packs = devices[0] == "cpu"
    of_rank = rank_weight_bytes(shape, 2, "packed16", packs=packs) + cache + PROCESS_BYTES
    assert of_rank < shape.weight_bytes("packed16") + 2 * cache + PROCESS_BYTES
    assert plan.bytes_per_device == dict.fromkeys(devices, of_rank * (3 - len(set(devices))))
    assert plan.detail.cache_tokens == 2 * shape.max_position


def test_ranks_on_one_device_share_its_budget(tiny: Path) -> None:
    budget = TorchFactory().plan(order(tiny, devices=("cpu", "cpu"))).bytes_per_device["cpu"]
    plan = TorchFactory().plan(order(tiny, devices=("cpu", "cpu"), memory_bytes=budget))
    assert plan.bytes_per_device == {"cpu": budget}
    assert plan.detail.cache_tokens == 16384
    with pytest.raises(BadRequest, match="does not fit into 700 MB"):
        TorchFactory().plan(order(tiny, devices=("cpu", "cpu"), memory_bytes=700 * MIB))
    assert TorchFactory().plan(order(tiny, devices=("GPU-a", "GPU-b"), memory_bytes=700 * MIB))


@pytest.mark.parametrize("quant", ["int8", "INT8"])
def test_int8_is_made_of_whatever_the_file_holds(tiny: Path, quantised: Path, quant: str) -> None:
    for path in (tiny, quantised):
        plan = TorchFactory(dtype="float32").plan(order(path, quant=quant))
        with open_checkpoint(path) as checkpoint:
            shape = read_shape(checkpoint)
        assert plan.detail.dtype == "int8"
        cache = 2 * shape.max_position * shape.kv_bytes_per_token
        assert plan.bytes_per_device == {"cpu": shape.weight_bytes("int8") + cache + PROCESS_BYTES}


@pytest.mark.parametrize("quant", ["q4_0", "Q4_0", "q4-0", None])
def test_a_quant_must_be_that_of_the_file(quantised: Path, quant: str | None) -> None:
    TorchFactory().plan(order(quantised, quant=quant))
    with pytest.raises(BadRequest, match="it holds q4_0"):
        TorchFactory().plan(order(quantised, quant="q8_0"))


def test_a_quant_may_be_told_by_the_files_name(quantised: Path) -> None:
    named = quantised.rename(quantised.with_name("model-Q3_K_M.gguf"))
    TorchFactory().plan(order(named, quant="q3_k_m"))


@pytest.mark.parametrize("quant", ["q3_k_m", "Q3_K_M/some-model.gguf", "some-model"])
def test_a_quant_by_which_the_hub_chose_is_that_of_the_file(
    quantised: Path, tmp_path: Path, quant: str
) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    (snapshot / "Q3_K_M").mkdir(parents=True)
    named = quantised.rename(snapshot / "Q3_K_M" / "some-model.gguf")
    TorchFactory().plan(order(named, quant=quant))
    with pytest.raises(BadRequest, match="not of the quantisation 'q8_0'"):
        TorchFactory().plan(order(named, quant="q8_0"))


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nonsense")
    with pytest.raises(LoadFailed, match=r"m\.gguf"):
        TorchFactory().plan(order(tmp_path / "m.gguf"))
    with pytest.raises(LoadFailed):
        open_codec(tmp_path / "m.gguf")


def test_a_checkpoint_brings_its_text_side(tiny: Path) -> None:
    codec = open_codec(tiny)
    text = codec.render([{"role": "user", "content": "Hé"}])
    ids = codec.encode(text)
    detokenizer = codec.detokenizer()
    assert "Hé" in detokenizer.feed(ids) + detokenizer.flush()
    assert codec.stop_ids == (codec.encode("<|im_end|>")[0],)


def test_a_quant_is_whole_words_of_the_file_s_name(quantised: Path) -> None:
    with open_checkpoint(quantised.rename(quantised.with_name("model-bf16.gguf"))) as checkpoint:
        for quant in ("bf16", "model", "MODEL_bf16", "model-bf16.gguf"):
            check_quant(quant, checkpoint)
        for quant in ("f16", "b", "odel-bf16"):
            with pytest.raises(BadRequest, match=f"not of the quantisation '{quant}'"):
                check_quant(quant, checkpoint)
