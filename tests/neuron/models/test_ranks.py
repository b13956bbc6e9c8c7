"""Two ranks over gloo compute what one does. They are this file, run as a program, one process each."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cortex.neuron.engine import ranks, worker
from cortex.neuron.engine.ranks import HEAD, Ranks
from cortex.neuron.engine.runner import Runner, load_runner
from cortex.neuron.models import llama, registry
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.nn.placement import Dtype, Placement, Share
from cortex.neuron.nn.plan import Copy, Segment, StepPlan
from cortex.neuron.weights.source import Piece, Source

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),  # what FBGEMM takes, deprecated
]

CPU = torch.device("cpu")
LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, INNER, VOCAB = 2, 40, 8, 4, 8, 96, 320
QUERIES, KEYS = HEADS * WIDTH, KV_HEADS * WIDTH
CACHE = 2900


class Case(NamedTuple):
    folder: str
    dtype: Dtype
    most: float
    """How far logits, some 8 at most, may be apart."""


CASES = {
    "fused": Case("fused", "float32", 1e-4),
    "llama": Case("llama", "float32", 1e-4),
    "llama-biases": Case("llama-biases", "float32", 1e-4),
    "qwen2": Case("qwen2", "float32", 1e-4),
    # Each rank rounds its part of what goes into a row-split matrix by itself.
    "llama-packed16": Case("llama", "packed16", 0.03),
    "llama-int8": Case("llama", "int8", 1.0),
}


# --- a family whose checkpoints fuse query, key and value -----------------------------------------

build = llama.build


def sources(shape: ModelShape, kind: str, share: Share) -> dict[str, Source]:
    """Those of llama, but for [Q | K | V] in one tensor, of which a rank has rows of all three regions."""
    found = llama.sources(shape, kind, share)
    width = shape.head_dim
    all_queries, all_keys = shape.heads * width, shape.kv_heads * width
    queries, (first, last) = share.of(all_queries, width), share.of(all_keys, width)
    for index in range(shape.layers):
        tensor = f"model.layers.{index}.self_attn.qkv_proj.weight"
        found[f"layers.{index}.attention.qkv.weight"] = (
            Piece(tensor, *queries, pairs=width),
            Piece(tensor, all_queries + first, all_queries + last, pairs=width),
            Piece(tensor, all_queries + all_keys + first, all_queries + all_keys + last),
        )
    return found


def weights(kind: str) -> dict[str, Tensor]:
    chance = torch.Generator().manual_seed(7)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=chance) * 0.3

    found = {"model.embed_tokens.weight": some(VOCAB, HIDDEN), "lm_head.weight": some(VOCAB, HIDDEN)}
    found["model.norm.weight"] = 1 + some(HIDDEN)
    for index in range(LAYERS):
        here = f"model.layers.{index}."
        linears = {
            "self_attn.q_proj": (QUERIES, HIDDEN),
            "self_attn.k_proj": (KEYS, HIDDEN),
            "self_attn.v_proj": (KEYS, HIDDEN),
            "self_attn.o_proj": (HIDDEN, QUERIES),
            "mlp.gate_proj": (INNER, HIDDEN),
            "mlp.up_proj": (INNER, HIDDEN),
            "mlp.down_proj": (HIDDEN, INNER),
        }
        for name, shape in linears.items():
            found[f"{here}{name}.weight"] = some(*shape)
        for name, shape in linears.items():
            if kind == "llama-biases" or (kind == "qwen2" and name[-6:] in ("q_proj", "k_proj", "v_proj")):
                found[f"{here}{name}.bias"] = some(shape[0])
        found[f"{here}input_layernorm.weight"] = 1 + some(HIDDEN)
        found[f"{here}post_attention_layernorm.weight"] = 1 + some(HIDDEN)
        if kind == "fused":
            parts = [found.pop(f"{here}self_attn.{part}_proj.weight") for part in "qkv"]
            found[f"{here}self_attn.qkv_proj.weight"] = torch.cat(parts)
    return found


def write(folder: Path, kind: str) -> None:
    folder.mkdir()
    config = {
        "model_type": kind.partition("-")[0],
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": WIDTH,
        "max_position_embeddings": 4096,
        "attention_bias": kind == "llama-biases",
        "mlp_bias": kind == "llama-biases",
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(kind), folder / "model.safetensors")


# --- what is computed -----------------------------------------------------------------------------

IDS = torch.randint(0, VOCAB, (2500,), generator=torch.Generator().manual_seed(1)).tolist()

PLANS = {
    "prefill": StepPlan(
        IDS[:50], [Segment(0, 20, [(0, 20)]), Segment(0, 30, [(100, 10), (120, 20)])], [*range(50)]
    ),
    "decode": StepPlan(
        IDS[50:52], [Segment(20, 1, [(0, 21)]), Segment(30, 1, [(100, 10), (120, 21)])], [0, 1]
    ),
    "mixed": StepPlan(
        IDS[52:65],
        [Segment(21, 1, [(0, 22)]), Segment(16, 12, [(200, 10), (220, 18)])],
        [0, 12],
        [Copy(0, 200, 10), Copy(10, 220, 6)],
    ),
    "nothing-wanted": StepPlan(IDS[:5], [Segment(0, 5, [(240, 5)])], []),
    "long": StepPlan(IDS, [Segment(0, 2500, [(300, 2500)])], [0, 2499]),
    "after-long": StepPlan(IDS[:2], [Segment(1500, 1, [(300, 1501)]), Segment(5, 1, [(240, 6)])], [0, 1]),
}


def of_encoded_size(size: int) -> StepPlan:
    def plan(count: int) -> StepPlan:
        return StepPlan([1] * count, [Segment(0, count, [(0, count)])], [])

    return plan(size - len(msgspec.msgpack.encode(plan(size))) + size)


LETTERS = [
    PLANS["mixed"],
    *(of_encoded_size(HEAD - 8 + more) for more in (-1, 0, 1)),
    of_encoded_size(5 * HEAD),
    StepPlan([], [], []),
]


def load(path: Path, case: Case, share: Share, told: list[int]) -> Runner:
    def report(done: int, total: int) -> None:
        assert done <= total
        told[:] = [total]

    placement = Placement(CPU, case.dtype, share)
    return load_runner(path / case.folder, placement, cache_rows=CACHE, report=report)


class Outcome(NamedTuple):
    """What a rank has of a case: logits by plan on the first one, bytes read, bytes of its cache."""

    logits: dict[str, Tensor]
    read: int
    cache: int


def be_rank(rank: int, models: Path, meeting: str, target: Path) -> None:
    torch.set_num_threads(1)
    cast(dict[str, str], registry.FAMILIES)["fused"] = __name__
    share = Share(rank, 2)
    ranks.join(share, meeting, device=CPU)
    link = Ranks(share, CPU)
    outcomes: dict[str, Any] = {}
    for name, case in CASES.items():
        told: list[int] = []
        runner = load(models, case, share, told)
        logits: dict[str, Tensor] = {}
        if rank:
            worker.follow(runner, link)
        else:
            for plan_name, plan in PLANS.items():
                link.tell(plan)
                logits[plan_name] = runner.logits(plan)
            link.end()
        outcomes[name] = tuple(Outcome(logits, told[0], runner.cache_bytes))
    if rank:
        outcomes["letters"] = msgspec.msgpack.encode(list(link.plans()))
    else:
        for plan in LETTERS:
            link.tell(plan)
        link.end()
    ranks.leave()
    torch.save(outcomes, target)


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    for kind in {case.folder for case in CASES.values()}:
        write(folder / kind, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cast(dict[str, str], registry.FAMILIES), "fused", __name__)
        yield folder


@pytest.fixture(scope="module")
def two_ranks(models: Path) -> list[dict[str, Any]]:
    """What each of two ranks has saved."""
    meeting = f"file://{models / 'meeting'}"
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    targets = [models / f"rank{rank}" for rank in range(2)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), models, meeting, target],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, target in enumerate(targets)
    ]
    try:
        said = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert [process.returncode for process in processes] == [0, 0], said
    return [torch.load(target) for target in targets]


@pytest.fixture(scope="module")
def one_rank(models: Path) -> Any:
    @functools.cache
    def compute(name: str) -> Outcome:
        told: list[int] = []
        runner = load(models, CASES[name], Share(), told)
        logits = {plan_name: runner.logits(plan) for plan_name, plan in PLANS.items()}
        return Outcome(logits, told[0], runner.cache_bytes)

    return compute


@pytest.mark.timeout(60)  # the first one waits for two processes that import torch
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_logits_of_one(two_ranks: list[dict[str, Any]], one_rank: Any, name: str) -> None:
    found, expected = Outcome(*two_ranks[0][name]), one_rank(name)
    assert found.logits.keys() == PLANS.keys()
    for plan_name, plan in PLANS.items():
        assert found.logits[plan_name].shape == (len(plan.wanted), VOCAB)
        if plan.wanted:
            difference = (found.logits[plan_name] - expected.logits[plan_name]).abs().max()
            assert difference <= CASES[name].most


def test_a_fused_tensor_is_its_parts(one_rank: Any) -> None:
    for plan_name in PLANS:
        assert torch.equal(one_rank("fused").logits[plan_name], one_rank("llama").logits[plan_name])


def test_biases_make_a_difference(one_rank: Any) -> None:
    """Otherwise their cases would show nothing."""
    for name in ("llama-biases", "qwen2"):
        assert (one_rank(name).logits["prefill"] - one_rank("llama").logits["prefill"]).abs().max() > 0.1


def test_a_plan_longer_than_one_message_was_among_them() -> None:
    assert len(msgspec.msgpack.encode(PLANS["long"])) > HEAD
    assert [len(msgspec.msgpack.encode(plan)) for plan in LETTERS[1:5]] == [
        HEAD - 9,
        HEAD - 8,
        HEAD - 7,
        5 * HEAD,
    ]


@pytest.mark.timeout(60)
def test_plans_of_every_size_arrive_as_they_are_until_the_end(two_ranks: list[dict[str, Any]]) -> None:
    assert msgspec.msgpack.decode(two_ranks[1]["letters"], type=list[StepPlan]) == LETTERS


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["fused", "llama"])
def test_a_rank_reads_its_own_rows_only_and_caches_its_own_heads(
    two_ranks: list[dict[str, Any]], one_rank: Any, name: str
) -> None:
    """And of matrices that are split by their columns its own columns only."""
    shared = LAYERS * 4 * HIDDEN * (2 * QUERIES + 2 * KEYS + 3 * INNER)
    whole = one_rank(name)
    assert [rank[name][1] for rank in two_ranks] == [whole.read - shared // 2] * 2
    assert [rank[name][2] for rank in two_ranks] == [whole.cache // 2] * 2


@pytest.mark.timeout(60)
def test_only_one_rank_has_the_biases_that_are_added_after_the_sum(
    two_ranks: list[dict[str, Any]], one_rank: Any
) -> None:
    first, second = (rank["llama-biases"][1] for rank in two_ranks)
    assert first - second == LAYERS * 4 * 2 * HIDDEN


def test_alone_plans_go_nowhere() -> None:
    link = Ranks(Share(), CPU)
    assert not link.others
    link.tell(PLANS["decode"])
    link.end()


if __name__ == "__main__":
    be_rank(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], Path(sys.argv[4]))
