from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cortex.neuron.engine.cache import SlotCache
from cortex.neuron.nn.plan import Segment, StepPlan
from cortex.neuron.nn.step import prepare

CPU = torch.device("cpu")
KV_HEADS, GROUP, WIDTH, CONTEXT = 2, 3, 8, 40


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def naive(queries: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Attention by its formula in fp64, token by token and head by head."""
    out = torch.empty(queries.shape[0], KV_HEADS * GROUP, WIDTH, dtype=torch.float64)
    for row in range(queries.shape[0]):
        for head in range(KV_HEADS * GROUP):
            seen = slice(0, start + row + 1)
            scores = keys[seen, head // GROUP].double() @ queries[row, head].double() / math.sqrt(WIDTH)
            out[row, head] = scores.softmax(0) @ values[seen, head // GROUP].double()
    return out.flatten(1)


@pytest.fixture
def cache() -> SlotCache:
    cache = SlotCache(2, 3, KV_HEADS, WIDTH, CONTEXT, CPU)
    for layer in cache.layers:
        for slot in layer._slots:
            slot.fill_(float("nan"))  # nothing that was not written may be read
    return cache


@pytest.mark.parametrize("lengths", [[12], [1] * 5, [5, 7, 1, 1], [1, 11]])
def test_attention_over_what_was_written_in_any_pieces(cache: SlotCache, lengths: list[int]) -> None:
    total = sum(lengths)
    keys_values, queries = random(total, 2, KV_HEADS, WIDTH), random(total, KV_HEADS * GROUP, WIDTH)
    layer = cache.layers[1]
    start = 0
    for length in lengths:
        step = prepare(StepPlan([0] * length, [Segment(2, start, length)], []), CPU)
        end = start + length
        layer.write(step, keys_values[start:end])
        expected = naive(queries[start:end], keys_values[:, 0], keys_values[:, 1], start)
        assert torch.allclose(layer.attend(step, queries[start:end]).double(), expected, atol=1e-5)
        start = end


def test_sequences_in_one_step_see_only_themselves(cache: SlotCache) -> None:
    layer = cache.layers[0]
    first, second = random(6, 2, KV_HEADS, WIDTH), random(9, 2, KV_HEADS, WIDTH)
    layer.write(prepare(StepPlan([0] * 5, [Segment(0, 0, 5)], []), CPU), first[:5])
    step = prepare(StepPlan([0] * 10, [Segment(0, 5, 1), Segment(1, 0, 9)], []), CPU)
    queries = random(10, KV_HEADS * GROUP, WIDTH)
    layer.write(step, torch.cat((first[5:], second)))
    expected = torch.cat(
        (naive(queries[:1], first[:, 0], first[:, 1], 5), naive(queries[1:], second[:, 0], second[:, 1], 0))
    )
    assert torch.allclose(layer.attend(step, queries).double(), expected, atol=1e-5)


def test_a_slot_that_is_used_again_shows_nothing_of_before(cache: SlotCache) -> None:
    layer = cache.layers[0]
    layer.write(prepare(StepPlan([0] * 20, [Segment(0, 0, 20)], []), CPU), random(20, 2, KV_HEADS, WIDTH))
    fresh, queries = random(4, 2, KV_HEADS, WIDTH), random(4, KV_HEADS * GROUP, WIDTH)
    step = prepare(StepPlan([0] * 4, [Segment(0, 0, 4)], []), CPU)
    layer.write(step, fresh)
    expected = naive(queries, fresh[:, 0], fresh[:, 1], 0)
    assert torch.allclose(layer.attend(step, queries).double(), expected, atol=1e-5)


def test_the_cache_measures_itself(cache: SlotCache) -> None:
    assert cache.nbytes == 2 * 3 * 2 * KV_HEADS * CONTEXT * WIDTH * 4
