"""Layers with a window in slots of their own: what every token sees, by the formula in fp64, and how little
they hold. Rows that nobody has written are NaN."""

from __future__ import annotations

import math
import random as chance
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cortex.neuron.engine.runner import Runner, load_runner
from cortex.neuron.engine.windows import WindowPool
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.plan import NearSlots, Segment, StateCopy, StepPlan
from cortex.neuron.nn.step import prepare

CPU = torch.device("cpu")
KV_HEADS, GROUP, WIDTH, LENGTH = 2, 3, 8, 120
WORKING, KEPT = 3, 2


class Text:
    """A sequence of which `cached` tokens are computed, in a slot."""

    def __init__(self, seed: int, slot: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.keys_values = torch.randn(LENGTH, 2, KV_HEADS, WIDTH, generator=generator)
        self.slot = slot
        self.cached = 0


class Windows:
    """A pool of two layers; the first one is asked."""

    def __init__(self, window: int, stride: int) -> None:
        self.sizes = NearSlots(window, stride)
        self.pool = WindowPool(self.sizes, 2, WORKING, KEPT, KV_HEADS, WIDTH, CPU)
        for stored in self.pool.stored:
            stored.fill_(float("nan"))

    def left(self, text: Text) -> int:
        """Tokens that the text's next segment may have."""
        return min(self.sizes.stride - text.cached % self.sizes.stride, LENGTH - text.cached)

    def compute(self, *work: tuple[Text, int]) -> float:
        """One step for the next tokens of some texts: the worst error."""
        segments = [
            Segment(text.cached, length, [(0, text.cached + length)], text.slot) for text, length in work
        ]
        count = sum(length for _, length in work)
        self.pool.begin(segments)
        step = prepare(StepPlan([0] * count, segments, []), CPU, None, self.sizes.window, self.sizes)
        fresh = torch.cat([text.keys_values[text.cached : text.cached + length] for text, length in work])
        queries = torch.randn(count, KV_HEADS * GROUP, WIDTH, generator=torch.Generator().manual_seed(count))
        layer = self.pool.layers[0]
        layer.write(step, fresh)
        found = layer.attend(step, queries, fresh).view(queries.shape)
        worst, row = 0.0, 0
        for text, length in work:
            for position in range(text.cached, text.cached + length):
                seen = text.keys_values[max(0, position + 1 - self.sizes.window) : position + 1]
                worst = max(worst, float((found[row] - formula(queries[row], seen)).abs().max()))
                row += 1
            text.cached += length
        assert not math.isnan(float(found.sum())), "a row was seen that nobody has written"
        return worst


def formula(query: Tensor, seen: Tensor) -> Tensor:
    """[heads, width] over [n, 2, kv_heads, width]."""
    keys, values = (part.repeat_interleave(GROUP, 1).double() for part in seen.unbind(1))
    scores = torch.einsum("hw,nhw->hn", query.double(), keys) / math.sqrt(WIDTH)
    return torch.einsum("hn,nhw->hw", scores.softmax(-1), values)


@pytest.mark.parametrize(("window", "stride"), [(8, 8), (8, 3), (3, 8), (1, 1), (20, 7), (LENGTH, 16)])
def test_a_sequence_of_any_length_sees_its_window_and_lies_in_one_piece(window: int, stride: int) -> None:
    windows = Windows(window, stride)
    text = Text(1, 1)
    while text.cached < LENGTH:
        assert windows.compute((text, 1)) <= 1e-5
    text, other = Text(2, 2), Text(3, 0)
    while text.cached < LENGTH:
        assert windows.compute((other, 1), (text, windows.left(text))) <= 1e-5
    assert windows.pool.stored[0].shape[3] == WORKING * (window + stride)


def test_one_token_looks_once_however_long_its_sequence_has_lain() -> None:
    sizes = NearSlots(8, 4)
    segments = [Segment(61, 1, [(0, 62)], 0), Segment(10, 1, [(100, 11)], 2)]
    near = prepare(StepPlan([0, 0], segments, []), CPU, None, 8, sizes).near
    assert near is not None
    assert near.slots.tolist() == [8 + 61 - 60, 2 * 12 + 8 + 10 - 8]
    (together,) = near.looks.views  # both gathered, as they see eight tokens each
    assert together.length == 8


def test_a_window_is_kept_on_the_host_and_found_again_in_any_slot() -> None:
    for tokens in (3, 8, 12, 13, 40):
        windows = Windows(8, 4)
        first = Text(1, 0)
        while first.cached < tokens:
            windows.compute((first, 1))
        windows.pool.copy([StateCopy(0, WORKING + 1, tokens)])
        while first.cached < tokens + 9:  # it goes on, and overwrites what it has left behind
            assert windows.compute((first, 1)) <= 1e-5
        again, third = Text(1, 2), Text(1, 1)
        again.cached = third.cached = tokens
        windows.pool.copy([StateCopy(WORKING + 1, 2, tokens), StateCopy(2, 1, tokens)])
        while again.cached < tokens + 20:
            assert windows.compute((again, windows.left(again))) <= 1e-5
            assert windows.compute((third, 1)) <= 1e-5


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), window=st.integers(1, 24), stride=st.integers(1, 24))
def test_any_steps_give_every_token_its_window(seed: int, window: int, stride: int) -> None:
    draws = chance.Random(seed)
    windows = Windows(window, stride)
    texts = [Text(seed + slot, slot) for slot in range(WORKING)]
    kept: dict[int, tuple[Tensor, int]] = {}
    for _ in range(30):
        texts = [text if text.cached < LENGTH else Text(draws.randrange(99), text.slot) for text in texts]
        chosen = draws.sample(texts, draws.randint(1, WORKING))
        most = [1 if draws.random() < 0.4 else windows.left(text) for text in chosen]
        work = [(text, draws.randint(1, length)) for text, length in zip(chosen, most, strict=True)]
        assert windows.compute(*work) <= 1e-5
        for text, length in work:  # of some that were computed only the first ones were right
            if draws.random() < 0.3:
                text.cached -= draws.randint(0, length - 1)
        text, place = draws.choice(texts), WORKING + draws.randrange(KEPT)
        if text.cached and draws.random() < 0.3:
            windows.pool.copy([StateCopy(text.slot, place, text.cached)])
            kept[place] = (text.keys_values, text.cached)
        elif place in kept and draws.random() < 0.5:
            text.keys_values, text.cached = kept[place]
            windows.pool.copy([StateCopy(place, text.slot, text.cached)])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma3_text", "mistral"])
def test_the_model_says_what_it_says_with_all_rows_kept(kind: str, make_tiny: Callable[..., Any]) -> None:
    """Against transformers, and with less memory than a cache of all rows."""
    tiny = make_tiny(kind, sliding_window=12)
    ids = [(7 * at + at * at) % 199 for at in range(100)]
    expected = tiny.logits(ids).log_softmax(-1)

    def load(stride: int | None) -> Runner:
        placement = Placement(CPU, "float32")
        return load_runner(
            tiny.directory, placement, cache_rows=256, report=lambda *_: None, working=1, stride=stride
        )

    slots, every = load(20), load(None)
    for runner in (slots, every):
        found, start = [], 0
        for length in [20, 7, 13, 20, *[1] * 40]:
            segment = Segment(start, length, [(0, start + length)], 0)
            rows = [*range(length)]
            found.append(runner.logits(StepPlan(ids[start : start + length], [segment], rows)).clone())
            start += length
        assert (torch.cat(found).log_softmax(-1) - expected).abs().max() <= 3e-4
    near = every.shape.near_bytes_per_token
    assert every.cache_bytes - slots.cache_bytes == near * (256 - 12 - 20)
    assert near == every.shape.kv_bytes_per_token * len(every.shape.sliding_layers) / every.shape.layers
