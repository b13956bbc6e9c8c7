"""Ranks over gloo compute what one does alone. They are forked from this file, run as a program."""

from __future__ import annotations

import functools
import itertools
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.runner import Runner, load_runner
from cortex.neuron.models import llama, registry
from cortex.neuron.models.division import largest_share, rank_weight_bytes
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.nn.placement import Dtype, Placement, Share
from cortex.neuron.nn.plan import Copy, Segment, StateCopy, StepPlan
from cortex.neuron.weights.source import Piece, Source

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
LAYERS, HIDDEN, HEADS, KV_HEADS, WIDTH, INNER, VOCAB = 2, 40, 8, 2, 8, 96, 321
"""Four ranks have to share KV heads, and no number of them divides the vocabulary."""
QUERIES, KEYS = HEADS * WIDTH, KV_HEADS * WIDTH
CACHE = 700
KEPT = 5
"""The slot behind those of running sequences, for a checkpoint of a state."""
WORLDS = (2, 4)
TOKENS = 12


class Case(NamedTuple):
    folder: str
    dtype: Dtype
    most: float
    """How far logits, some 8 at most, may be apart."""
    stride: int | None = None
    """Layers with a window have slots, and so many tokens in a stretch."""


CASES = {
    "fused": Case("fused", "float32", 1e-4),
    "llama": Case("llama", "float32", 1e-4),
    # Each rank rounds its part of what goes into a row-split matrix by itself.
    "llama-packed16": Case("llama", "packed16", 0.03),
    "qwen3_moe": Case("qwen3_moe", "float32", 1e-4),
    "qwen3_5": Case("qwen3_5_text", "float32", 1e-4),
    "qwen3_moe-fp8": Case("qwen3_moe-fp8", "float32", 1e-4),
    "gemma3": Case("gemma3_text", "float32", 1e-4, stride=81),
}
MORE_CASES = {
    "llama-biases": Case("llama-biases", "float32", 1e-4),
    "qwen2": Case("qwen2", "float32", 1e-4),
    "llama-int8": Case("llama", "int8", 1.0),
    "qwen3": Case("qwen3", "float32", 1e-4),
    "gemma3-all-rows": Case("gemma3_text", "float32", 1e-4),
    "qwen3_next": Case("qwen3_next", "float32", 1e-4),
    "qwen3_5_moe": Case("qwen3_5_moe_text", "float32", 1e-4),
    "qwen3_5-fp8": Case("qwen3_5_text-fp8", "float32", 1e-4),
}
"""For runs with --long."""
ALL_CASES = {**CASES, **MORE_CASES}
PARAMETERS = [*CASES, *(pytest.param(name, marks=pytest.mark.long) for name in MORE_CASES)]
FOUR_HEADS = {"num_attention_heads": 4, "head_dim": 16}
FOUR_DELTAS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
TINY: dict[str, dict[str, Any]] = {
    "qwen3": FOUR_HEADS,
    "qwen3_moe": {**FOUR_HEADS, "num_experts": 8, "tie_word_embeddings": True},
    "gemma3_text": FOUR_HEADS,
    "qwen3_next": {**FOUR_DELTAS, "num_experts": 8},
    "qwen3_5_text": {**FOUR_DELTAS, "tie_word_embeddings": True},
    "qwen3_5_moe_text": {**FOUR_DELTAS, "num_experts": 8},
}
"""Random models of transformers, by kind: what makes them divisible by four."""
FP8 = (20, 24), torch.bfloat16
"""Blocks that end where no rank's rows and columns do, and the type of their scales."""


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

IDS = torch.randint(0, 199, (400,), generator=torch.Generator().manual_seed(1)).tolist()

EVERY_LAYER = 9
"""Of any of these models, those that are left."""
PLANS = {
    "prefill": StepPlan(
        IDS[:50], [Segment(0, 20, [(0, 20)], 0), Segment(0, 30, [(100, 10), (120, 20)], 1)], [*range(50)]
    ),
    "decode": StepPlan(
        IDS[50:52], [Segment(20, 1, [(0, 21)], 0), Segment(30, 1, [(100, 10), (120, 21)], 1)], [0, 1]
    ),
    "going-on": StepPlan(
        IDS[65:116],
        [Segment(21, 1, [(0, 22)], 0), Segment(31, 50, [(100, 10), (120, 71)], 1)],
        [0, 1, 50],
        [],
        [StateCopy(0, KEPT, 21)],
    ),
    "mixed": StepPlan(
        IDS[52:65],
        [Segment(22, 1, [(0, 23)], 0), Segment(16, 12, [(200, 10), (220, 18)], 2)],
        [0, 12],
        [Copy(0, 200, 10), Copy(10, 220, 6)],
        [StateCopy(KEPT, 2, 16)],
    ),
    "a-chunk-passes-a-layer": StepPlan(
        [], [], [], chunk=StepPlan(IDS[100:140], [Segment(0, 40, [(250, 40)], 3)], [39]), layers=1
    ),
    "between": StepPlan(IDS[200:201], [Segment(81, 1, [(100, 10), (120, 72)], 1)], [0]),
    "a-chunk-is-through": StepPlan([], [], [], layers=EVERY_LAYER),
    "nothing-wanted": StepPlan(IDS[:5], [Segment(0, 5, [(240, 5)], 3)], []),
    "long": StepPlan(IDS, [Segment(0, 400, [(300, 400)], 4)], [0, 399]),
    "after-long": StepPlan(IDS[:2], [Segment(150, 1, [(300, 151)], 4), Segment(5, 1, [(240, 6)], 3)], [0, 1]),
}


def plans_of(name: str) -> dict[str, StepPlan]:
    """Those of a case: where there are stretches, each segment lies in one."""
    stride = ALL_CASES[name].stride

    def fits(plan: StepPlan) -> bool:
        parts = [*plan.segments, *(plan.chunk.segments if plan.chunk else [])]
        return stride is None or all(part.start // stride == (part.end - 1) // stride for part in parts)

    found = {key: plan for key, plan in PLANS.items() if fits(plan)}
    if "long" not in found:
        del found["after-long"]
    assert len(found) >= len(PLANS) - 2
    return found


LETTERS = [
    PLANS["mixed"],
    StepPlan([], [], []),
    StepPlan([1] * 100_000, [Segment(0, 100_000, [(0, 100_000)])], []),
    *[PLANS["decode"]] * 3,
]
"""Plans of all sizes, the empty one included."""


def load(path: Path, case: Case, share: Share, told: list[int]) -> Runner:
    """What computes plans. The rank takes what was foretold, at most that in forms that depend on the CPU."""

    def report(done: int, total: int) -> None:
        assert done <= total
        told[:] = [total]

    placement = Placement(CPU, case.dtype, share)
    runner = load_runner(
        path / case.folder,
        placement,
        cache_rows=CACHE,
        report=report,
        working=KEPT,
        kept=1,
        stride=case.stride,
    )
    foretold = rank_weight_bytes(runner.shape, share.world, case.dtype)
    assert runner.weight_bytes <= foretold
    if case.dtype == "float32" and share.rank == share.world - 1 and "biases" not in case.folder:
        assert runner.weight_bytes == foretold, "the last rank has most of the vocabulary"
    own = largest_share(runner.shape, share.world)
    expected = CACHE * own.kv_bytes_per_token + (KEPT + 1) * own.state_bytes
    if case.stride is not None and own.window is not None:
        saved = CACHE - KEPT * (own.window + case.stride) - own.window
        expected -= saved * own.near_bytes_per_token
    assert runner.cache_bytes == expected
    return runner


class Outcome(NamedTuple):
    """What a rank has of a case: logits by plan on the first one, bytes read, bytes of its cache, by plan how
    often ranks met in a sum, and what the first one says after all that.
    """

    logits: dict[str, Tensor]
    read: int
    cache: int
    sums: dict[str, int]
    tokens: list[int]


def greedy(compute: Callable[[StepPlan], Tensor]) -> list[int]:
    """The likeliest tokens after the sequence in slot 0, a step each."""
    tokens = [IDS[0]]
    for at in range(23, 23 + TOKENS):
        plan = StepPlan(tokens[-1:], [Segment(at, 1, [(0, at + 1)], 0)], [0])
        tokens.append(int(compute(plan).argmax()))
    return tokens


def be_rank(share: Share, links: list[socket.socket], models: Path, names: list[str]) -> dict[str, Any]:
    cast(dict[str, str], registry.FAMILIES)["fused"] = __name__
    torch.set_num_threads(1)
    link = Ranks(share, links)
    link.meet(CPU)
    outcomes: dict[str, Any] = {}
    all_reduce, count = dist.all_reduce, itertools.count(1)
    dist.all_reduce = lambda tensor, **more: (next(count), all_reduce(tensor, **more))[1]
    plans = link.plans() if share.rank else iter(())
    for name in names:
        case = ALL_CASES[name]
        told: list[int] = []
        runner = load(models, case, share, told)
        logits: dict[str, Tensor] = {}
        sums: dict[str, int] = {}
        for plan_name, plan in plans_of(name).items():
            before = next(count)
            if share.rank:
                assert next(plans) == plan
            else:
                link.tell(plan)
            found = runner.logits(plan)
            sums[plan_name] = next(count) - before - 1
            if not share.rank:
                logits[plan_name] = found
        tokens: list[int] = []
        if share.rank:
            for plan in itertools.islice(plans, TOKENS):
                runner.logits(plan)
        else:
            tokens = greedy(lambda plan, runner=runner: link.tell(plan) or runner.logits(plan))
        outcomes[name] = tuple(Outcome(logits, told[0], runner.cache_bytes, sums, tokens))
    if share.rank:
        outcomes["letters"] = msgspec.msgpack.encode(list(plans))
    else:
        for plan in LETTERS:
            link.tell(plan)
            link.rest()
    return outcomes


def fork_ranks(world: int, models: Path, names: list[str]) -> list[int]:
    """A process a rank, each of which saves its outcome; their pids."""
    pairs = [socket.socketpair() for _ in range(1, world)]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            mine = [pairs[rank - 1][1]] if rank else [pair[0] for pair in pairs]
            for link in {link for pair in pairs for link in pair} - set(mine):
                link.close()
            torch.save(be_rank(Share(rank, world), mine, models, names), models / f"{rank}of{world}")
            os._exit(0)  # as workers do, without anybody's clean-up
        pids.append(pid)
    for pair in pairs:
        for link in pair:
            link.close()
    return pids


# --- the tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def names(request: pytest.FixtureRequest) -> list[str]:
    """Of the cases that this run has."""
    return list(ALL_CASES if request.config.option.long else CASES)


@pytest.fixture(scope="module")
def models(
    tmp_path_factory: pytest.TempPathFactory, names: list[str], make_tiny: Any, make_twins: Any
) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("ranks")
    for kind in {case.folder for case in ALL_CASES.values()}:
        tiny = kind.removesuffix("-fp8")
        if tiny in TINY and kind in {ALL_CASES[name].folder for name in names}:
            made = make_tiny(tiny, **TINY[tiny]).directory
            (folder / kind).symlink_to(made if tiny == kind else make_twins(made, *FP8).fp8)
        elif tiny not in TINY:
            write(folder / kind, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cast(dict[str, str], registry.FAMILIES), "fused", __name__)
        yield folder


@pytest.fixture(scope="module")
def ranks(models: Path, names: list[str]) -> dict[int, list[dict[str, Any]]]:
    """What each of the ranks has saved, by how many there were."""
    program = [sys.executable, __file__, str(models), *names]
    done = subprocess.run(program, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    return {world: [torch.load(models / f"{rank}of{world}") for rank in range(world)] for world in WORLDS}


@pytest.fixture(scope="module")
def one_rank(models: Path) -> Any:
    @functools.cache
    def compute(name: str) -> Outcome:
        told: list[int] = []
        runner = load(models, ALL_CASES[name], Share(), told)
        logits = {plan_name: runner.logits(plan) for plan_name, plan in plans_of(name).items()}
        return Outcome(logits, told[0], runner.cache_bytes, {}, greedy(runner.logits))

    return compute


@pytest.mark.timeout(60)  # the first one waits for processes that import torch
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_ranks_give_the_logits_of_one(ranks: Any, one_rank: Any, name: str, world: int) -> None:
    found, expected = Outcome(*ranks[world][0][name]), one_rank(name)
    assert found.logits.keys() == plans_of(name).keys()
    for plan_name in plans_of(name):
        assert found.logits[plan_name].shape == expected.logits[plan_name].shape
        if len(expected.logits[plan_name]):
            difference = (found.logits[plan_name] - expected.logits[plan_name]).abs().max()
            assert difference <= ALL_CASES[name].most
            if ALL_CASES[name].dtype == "float32":
                assert torch.equal(found.logits[plan_name].argmax(1), expected.logits[plan_name].argmax(1))


@pytest.mark.timeout(60)
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("name", PARAMETERS)
def test_ranks_choose_the_tokens_of_one(ranks: Any, one_rank: Any, name: str, world: int) -> None:
    tokens = one_rank(name).tokens
    assert len(set(tokens)) > 1
    if ALL_CASES[name].dtype == "float32":
        assert Outcome(*ranks[world][0][name]).tokens == tokens


@pytest.mark.timeout(60)
def test_ranks_meet_twice_a_layer_and_once_for_the_table(ranks: Any) -> None:
    for name, case in CASES.items():
        layers = 3 if case.folder.removesuffix("-fp8") in TINY else LAYERS
        for rank in ranks[2]:
            expected = dict.fromkeys(plans_of(name), 2 * layers + 1)
            expected["a-chunk-passes-a-layer"] = 2 + 1
            expected["a-chunk-is-through"] = 2 * (layers - 1)
            expected["nothing-wanted"] = 2 * (layers - 1) + 1
            assert Outcome(*rank[name]).sums == expected


def test_a_fused_tensor_is_its_parts(one_rank: Any) -> None:
    for plan_name in PLANS:
        assert torch.equal(one_rank("fused").logits[plan_name], one_rank("llama").logits[plan_name])


def test_biases_make_a_difference(one_rank: Any) -> None:
    """Otherwise their cases would show nothing."""
    for name in ("llama-biases", "qwen2"):
        assert (one_rank(name).logits["prefill"] - one_rank("llama").logits["prefill"]).abs().max() > 0.1


@pytest.mark.timeout(60)
def test_plans_of_every_size_arrive_as_they_are_until_the_end(ranks: Any) -> None:
    for rank in (1, 2, 3):
        assert msgspec.msgpack.decode(ranks[4][rank]["letters"], type=list[StepPlan]) == LETTERS


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", ["fused", "llama"])
def test_a_rank_reads_its_own_bytes_only_and_caches_its_own_heads(
    ranks: Any, one_rank: Any, name: str
) -> None:
    """And its own columns of matrices that are split by those."""
    row, whole = 4 * HIDDEN, one_rank(name)
    for world in WORLDS:
        split = LAYERS * (2 * QUERIES + 3 * INNER)
        keys = LAYERS * 2 * KEYS
        missing = split * (world - 1) // world + keys // 2
        words = [(rank + 1) * VOCAB // world - rank * VOCAB // world for rank in range(world)]
        read = [whole.read - row * (missing + 2 * (VOCAB - own)) for own in words]
        assert [rank[name][1] for rank in ranks[world]] == read
        assert [rank[name][2] for rank in ranks[world]] == [whole.cache // 2] * world


@pytest.mark.long
@pytest.mark.timeout(60)
def test_only_one_rank_has_the_biases_that_are_added_after_the_sum(ranks: Any) -> None:
    first, second = (rank["llama-biases"][1] for rank in ranks[2])
    words = 2 * 4 * HIDDEN  # the second rank has one more row of table and head
    assert first - second == LAYERS * 4 * 2 * HIDDEN - words


if __name__ == "__main__":
    # Forked before torch has computed anything: a process that has threads cannot be forked well.
    started = [pid for world in WORLDS for pid in fork_ranks(world, Path(sys.argv[1]), sys.argv[2:])]
    sys.exit(any(os.waitpid(pid, 0)[1] for pid in started))
