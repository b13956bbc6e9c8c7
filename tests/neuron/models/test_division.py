"""Which models can be divided among ranks, and what a rank has of one."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cortex.neuron.models.division import indivisible, largest_share, rank_weight_bytes
from cortex.neuron.models.shape import DeltaShape, ExpertsShape, ModelShape, Rope
from cortex.neuron.nn.placement import Share

SHAPE = ModelShape(
    architecture="qwen3_5_moe",
    layers=2,
    hidden=40,
    heads=16,
    kv_heads=2,
    head_dim=8,
    intermediate=96,
    vocab=321,
    max_position=256,
    rope=Rope(10000.0),
    norm_eps=1e-6,
    tied=False,
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    delta=DeltaShape(key_heads=4, value_heads=8, key_width=8, value_width=8, kernel=4),
    experts=ExpertsShape(count=8, active=2, intermediate=24, normalised=True, shared_intermediate=16),
)


def changed(**changes: Any) -> ModelShape:
    return msgspec.structs.replace(SHAPE, **changes)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_what_can_be_divided(ranks: int) -> None:
    assert indivisible(SHAPE, ranks) is None
    assert indivisible(changed(delta=None, experts=None), ranks) is None
    assert indivisible(changed(intermediate=91), ranks) is None, "no layer has any of these"


@pytest.mark.parametrize(
    ("shape", "ranks", "words"),
    [
        (SHAPE, 3, "2 KV heads can neither be divided among 3 ranks nor repeated evenly"),
        (changed(kv_heads=6, heads=12), 4, "6 KV heads can neither"),
        (changed(heads=6), 4, "6 heads cannot be divided among 4 ranks"),
        (changed(intermediate=90, experts=None), 4, "90 intermediate rows"),
        (changed(intermediate=90, dense_layers=(1,)), 4, "90 intermediate rows"),
        (SHAPE, 8, "4 key heads of the DeltaNet"),
        (changed(experts=msgspec.structs.replace(SHAPE.experts, count=6)), 4, "6 experts"),
        (
            changed(experts=msgspec.structs.replace(SHAPE.experts, shared_intermediate=6)),
            4,
            "6 .* shared expert",
        ),
        (changed(vocab=3), 4, "A vocabulary of 3 "),
    ],
)
def test_what_cannot_be_divided_is_told_with_the_numbers(shape: ModelShape, ranks: int, words: str) -> None:
    told = indivisible(shape, ranks)
    assert told is not None
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(told)


def test_a_share_has_its_part_of_everything() -> None:
    share = largest_share(SHAPE, 4)
    assert (share.heads, share.kv_heads, share.intermediate, share.vocab) == (4, 1, 24, 81)
    assert share.delta is not None
    assert (share.delta.key_heads, share.delta.value_heads) == (1, 2)
    assert share.experts is not None
    assert (share.experts.count, share.experts.shared_intermediate, share.experts.intermediate) == (2, 4, 24)
    assert (share.hidden, share.layers, share.head_dim) == (SHAPE.hidden, SHAPE.layers, SHAPE.head_dim)


def test_one_rank_has_all() -> None:
    assert largest_share(SHAPE, 1) == SHAPE
    for dtype in ("float32", "packed16", "int8"):
        assert rank_weight_bytes(SHAPE, 1, dtype) == SHAPE.weight_bytes(dtype)


def test_every_rank_of_several_has_the_whole_router_in_fp64() -> None:
    whole = 8 * SHAPE.hidden * 8 * SHAPE.layers
    of_share = 4 * SHAPE.hidden * 2 * SHAPE.layers
    assert rank_weight_bytes(SHAPE, 4, "float32") == (
        largest_share(SHAPE, 4).weight_bytes("float32") + whole - of_share
    )


@pytest.mark.parametrize(
    ("units", "world", "expected"),
    [
        (8, 4, [(0, 20), (20, 40), (40, 60), (60, 80)]),
        (2, 4, [(0, 10), (0, 10), (10, 20), (10, 20)]),
        (1, 3, [(0, 10)] * 3),
        (3, 1, [(0, 30)]),
    ],
)
def test_whole_units_are_divided_or_repeated(units: int, world: int, expected: list[tuple[int, int]]) -> None:
    assert [Share(rank, world).of(10 * units, 10) for rank in range(world)] == expected
    assert all(
        Share(rank, world).divide(units) * 10 == stop - start for rank, (start, stop) in enumerate(expected)
    )


@pytest.mark.parametrize(("size", "world"), [(321, 4), (4, 4), (258, 1), (49152, 3)])
def test_rows_are_spread_without_gap_and_the_last_rank_has_most(size: int, world: int) -> None:
    parts = [Share(rank, world).spread(size) for rank in range(world)]
    assert [row for part in parts for row in range(*part)] == list(range(size))
    counts = [stop - start for start, stop in parts]
    assert max(counts) - min(counts) <= 1
    assert counts[-1] == max(counts) == largest_share(changed(vocab=size), world).vocab
