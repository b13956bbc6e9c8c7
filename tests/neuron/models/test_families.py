"""Every family against transformers, on the same random weights, read from sharded safetensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cortex.neuron.nn import matrix
from cortex.neuron.nn.plan import Copy, Segment, StepPlan

pytestmark = pytest.mark.slow


class Case(NamedTuple):
    """`most`: how far log probabilities may be apart. transformers differs from itself in fp64 by a third of
    it with attention alone, by half of it with experts or a Gated DeltaNet."""

    kind: str
    options: dict[str, Any]
    most: float = 3e-4


CASES = {
    "mistral": Case("mistral", {}),
    "mistral-without-window": Case("mistral", {"sliding_window": None}),
    "qwen2-window": Case("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
    "qwen3": Case("qwen3", {}),
    "qwen3-tied": Case("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 6}),
    "qwen3-biases": Case("qwen3", {"attention_bias": True}),
    "qwen3-window": Case("qwen3", {"use_sliding_window": True, "sliding_window": 33, "max_window_layers": 2}),
    "qwen3_moe": Case("qwen3_moe", {}, 1e-3),
    "qwen3_moe-normalised": Case(
        "qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1], "tie_word_embeddings": True}, 1e-3
    ),
    "qwen3_moe-window": Case(
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 20, "layer_types": ["full_attention"] * 3},
        1e-3,
    ),
    "qwen3_moe-sparse": Case("qwen3_moe", {"decoder_sparse_step": 2, "num_experts_per_tok": 6}, 1e-3),
    "qwen3_next": Case("qwen3_next", {}, 1e-3),
    "qwen3_next-biases": Case(
        "qwen3_next",
        {"attention_bias": True, "norm_topk_prob": False, "mlp_only_layers": [0]},
        1e-3,
    ),
    "qwen3_5": Case("qwen3_5_text", {}, 1e-3),
    "qwen3_5-tied": Case("qwen3_5_text", {"tie_word_embeddings": True, "linear_num_key_heads": 6}, 1e-3),
    "qwen3_5_moe": Case("qwen3_5_moe_text", {}, 1e-3),
    "gemma3": Case("gemma3_text", {"query_pre_attn_scalar": 20, "final_logit_softcapping": 4.0}),
    "gemma3-untied": Case("gemma3_text", {"tie_word_embeddings": False, "sliding_window_pattern": 3}),
}
LONG = {
    "mistral-without-window",
    "qwen3-biases",
    "qwen3-window",
    "qwen3_moe-sparse",
    "qwen3_next-biases",
    "gemma3-untied",
}
"""Cases that differ from others by little."""
IDS = torch.randint(0, 199, (150,), generator=torch.Generator().manual_seed(1)).tolist()


def cases(*kinds: str) -> list[Any]:
    """Those whose kinds begin in one of these ways."""
    return [
        pytest.param(name, marks=pytest.mark.long if name in LONG else [])
        for name, case in CASES.items()
        if case.kind.startswith(kinds or ("",))
    ]


@pytest.fixture(scope="module", params=cases())
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def tiny(case: Case, make_tiny: Callable[..., Any]) -> Any:
    return make_tiny(case.kind, **case.options)


@pytest.fixture(scope="module")
def expected(tiny: Any) -> Tensor:
    found: Tensor = tiny.logits(IDS).log_softmax(-1)
    return found


@pytest.fixture(scope="module")
def made(tiny: Any, computing: Any) -> Any:
    return computing(tiny.directory)


def error(logits: Tensor, expected: Tensor) -> float:
    return float((logits.log_softmax(-1) - expected).abs().max())


@pytest.mark.parametrize(
    "chunks", [[150], [64, 64, 22], [63, 1, 65, 21], [1, 9, 100, 40], [97] + 53 * [1]], ids=len
)
def test_prefill_in_any_chunks_and_decode_are_the_reference(
    made: Any, case: Case, expected: Tensor, chunks: list[int]
) -> None:
    assert error(made.in_chunks(IDS, chunks), expected) <= case.most


def test_sequences_in_one_step_are_as_if_alone(made: Any, case: Case, expected: Tensor) -> None:
    """One decodes, one goes on with its prompt, one begins; then the first two have a prefix in common."""
    made.in_chunks(IDS[:90], [90], [(200, 90)])
    made.in_chunks(IDS[:7], [7], [(50, 5), (60, 2)])
    segments = [
        Segment(90, 1, [(200, 91)]),
        Segment(7, 65, [(50, 5), (60, 20), (90, 47)]),
        Segment(0, 30, [(300, 30)]),
    ]
    ids = [IDS[90], *IDS[7:72], *IDS[:30]]
    logits = made.logits(StepPlan(ids, segments, [0, *range(66), 95]))
    assert error(logits, expected[[90, 90, *range(7, 72), 29]]) <= case.most


def test_of_the_last_layer_only_rows_go_on_that_are_asked_for(
    made: Any, case: Case, expected: Tensor
) -> None:
    """Of a prompt, its first chunk asks for none, the second for two rows together and its last one."""
    gone_on = []

    def count(mlp: object, inputs: tuple[Tensor], output: object) -> None:
        gone_on.append(len(inputs[0]))

    first = StepPlan(IDS[:30], [Segment(0, 30, [(100, 30)])], [])
    segments = [Segment(0, 1, [(10, 1)]), Segment(30, 45, [(100, 50), (200, 25)]), Segment(0, 20, [(20, 20)])]
    second = StepPlan([IDS[0], *IDS[30:75], *IDS[:20]], segments, [0, 6, 7, 45, 65])
    hook = made.model.layers[-1].mlp.register_forward_hook(count)
    try:
        assert made.logits(first).shape == (0, made.shape.vocab)
        logits = made.logits(second)
    finally:
        hook.remove()
    assert error(logits, expected[[0, 35, 36, 74, 19]]) <= case.most
    assert gone_on == [5]


@pytest.mark.parametrize("case", cases("mistral", "qwen2", "qwen3_moe", "gemma3"), indirect=True)
def test_a_copied_prefix_is_as_if_computed(made: Any, case: Case, expected: Tensor) -> None:
    """Of models that have nothing but keys and values."""
    made.in_chunks(IDS[:64], [64], [(0, 64)])
    segments = [Segment(64, 1, [(0, 64), (100, 1)]), Segment(50, 30, [(0, 48), (120, 32)])]
    plan = StepPlan([IDS[64], *IDS[50:80]], segments, [*range(31)], [Copy(48, 120, 2)])
    assert error(made.logits(plan), expected[[64, *range(50, 80)]]) <= case.most


def test_greedy_tokens_are_the_references_but_for_ties(made: Any, case: Case, tiny: Any) -> None:
    prompt = IDS[:67]
    tokens = made.greedy(prompt, 64)
    reference = tiny.logits(prompt + tokens[:-1])[len(prompt) - 1 :].log_softmax(-1)
    chosen = reference.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    assert (reference.amax(-1) - chosen).max() <= case.most


def test_weights_and_cache_take_what_the_shape_foretold(made: Any) -> None:
    shape = made.shape
    assert made.weight_bytes == shape.weight_bytes("float32")
    assert made.cache_bytes == 400 * shape.kv_bytes_per_token + 10 * shape.state_bytes


@pytest.mark.parametrize(
    ("dtype", "most"), [("packed16", 0.05), pytest.param("int8", 0.5, marks=pytest.mark.long)]
)
def test_packed_weights_are_close_and_take_at_most_what_was_foretold(
    tiny: Any, computing: Any, expected: Tensor, dtype: str, most: float
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix, "FEW_WEIGHTS", 0)
        packed = computing(tiny.directory, dtype)
    assert packed.weight_bytes <= packed.shape.weight_bytes(dtype)
    found = packed.in_chunks(IDS, [100, 1, 1, 1, 47]).log_softmax(-1)
    assert (found - expected).abs().mean() <= most
