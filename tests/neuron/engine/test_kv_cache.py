"""Attention over the cache's runs against attention by its formula in fp64."""

from __future__ import annotations

import math
import random as chance
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cortex.neuron.engine import cache as module
from cortex.neuron.engine.cache import RunCache
from cortex.neuron.nn import looks
from cortex.neuron.nn.plan import Copy, Run, Segment, StepPlan, parts
from cortex.neuron.nn.step import prepare

CPU = torch.device("cpu")
KV_HEADS, GROUP, WIDTH, ROWS = 2, 3, 8, 160
NAN = float("nan")


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def naive(query: Tensor, seen: Tensor) -> Tensor:
    """One token's [heads, width] over [n, 2, kv_heads, width], head by head: [heads * width]."""
    out = torch.empty(KV_HEADS * GROUP, WIDTH, dtype=torch.float64)
    for head in range(KV_HEADS * GROUP):
        keys, values = seen[:, :, head // GROUP].double().unbind(1)
        out[head] = (keys @ query[head].double() / math.sqrt(WIDTH)).softmax(0) @ values
    return out.flatten()


class Text:
    """A sequence: the keys and values of its tokens, and where the cache has them."""

    def __init__(self, runs: list[Run], seed: int) -> None:
        self.runs = runs
        self.length = sum(count for _, count in runs)
        self.keys_values = random(self.length, 2, KV_HEADS, WIDTH, seed=seed)
        self.cached = 0

    def sharing(self, other: Text, tokens: int) -> Text:
        """This one begins with the first `tokens` of another one, which lie where this one's do."""
        self.keys_values[:tokens] = other.keys_values[:tokens]
        self.cached = tokens
        return self

    def segment(self, length: int) -> Segment:
        return Segment(self.cached, length, parts(self.runs, 0, self.cached + length))


class Cache(RunCache):
    """Of two layers, that both have the window if there is one."""

    def __init__(self, window: int | None = None) -> None:
        super().__init__(2, ROWS, KV_HEADS, WIDTH, CPU, near=() if window is None else (0, 1))
        self.window = window
        self._stored.fill_(NAN)  # nothing that was not written may be read


WINDOWS = [None, 1, 2, 3, 7, 16]


@pytest.fixture(params=WINDOWS)
def cache(request: pytest.FixtureRequest) -> Cache:
    return Cache(request.param)


def compute(cache: Cache, work: list[tuple[Text, int]], layer: int = 0) -> float:
    """One step for the next tokens of some texts: the worst error. With the flash kernel and without."""
    segments = [text.segment(length) for text, length in work]
    count = sum(length for _, length in work)
    step = prepare(StepPlan([0] * count, segments, []), CPU, window=cache.window)
    fresh = torch.cat([text.keys_values[text.cached : text.cached + length] for text, length in work])
    queries = 2 * random(count, KV_HEADS * GROUP, WIDTH, seed=count)
    expected, row = [], 0
    for text, length in work:
        for at in range(length):
            end = text.cached + at + 1
            oldest = 0 if cache.window is None else max(0, end - cache.window)
            expected.append(naive(queries[row + at], text.keys_values[oldest:end]))
        row += length
        text.cached += length
    # As a layer has them: queries, keys and values are parts of one projection.
    projected = torch.cat((queries, fresh.flatten(1, 2)), dim=1)
    queries = projected[:, : KV_HEADS * GROUP]
    fresh = projected[:, KV_HEADS * GROUP :].view(count, 2, KV_HEADS, WIDTH)
    cache.layers[layer].write(step, fresh)
    found = cache.layers[layer].attend(step, queries, fresh)
    with pytest.MonkeyPatch.context() as patch:  # as on a device other than a CPU
        patch.setattr(looks, "KNOWS_CAUSALITY", ())
        patch.setattr(cache.layers[layer], "_plainly", True)
        masked = prepare(StepPlan([0] * count, segments, []), CPU, window=cache.window)
        plain = cache.layers[layer].attend(masked, queries, fresh)
    assert found.shape == (count, KV_HEADS * GROUP * WIDTH)
    assert (found - plain).abs().max() <= 2e-6
    return float((found - torch.stack(expected)).abs().max())


@pytest.mark.parametrize("runs", [[(0, 12)], [(30, 5), (10, 7)], [(9, 1), (7, 1), (20, 10)]])
@pytest.mark.parametrize("lengths", [[12], [1] * 12, [5, 5, 1, 1], [1, 11], [4, 3, 5], [6, 6]])
def test_attention_over_what_was_written_in_any_pieces(
    cache: Cache, lengths: list[int], runs: list[Run]
) -> None:
    text = Text(runs, 1)
    for length in lengths:
        assert compute(cache, [(text, length)], layer=1) <= 1e-5


def test_sequences_in_one_step_see_only_themselves(cache: Cache) -> None:
    first, second = Text([(0, 6)], 1), Text([(6, 9)], 2)
    assert compute(cache, [(first, 5)]) <= 1e-5
    assert compute(cache, [(first, 1), (second, 9)]) <= 1e-5


def test_rows_that_are_used_again_show_nothing_of_before(cache: Cache) -> None:
    assert compute(cache, [(Text([(0, 20)], 1), 20)]) <= 1e-5
    text = Text([(3, 4), (0, 3)], 2)
    assert compute(cache, [(text, 4)]) <= 1e-5
    assert compute(cache, [(text, 2)]) <= 1e-5
    assert compute(cache, [(text, 1)]) <= 1e-5


def test_sequences_share_the_run_of_their_prefix(cache: Cache) -> None:
    """Eight sequences go on from one prefix, others between them, some of these with a run of their own."""
    first = Text([(10, 20), (40, 8)], 1)
    assert compute(cache, [(first, 20)]) <= 1e-5
    work = [(first, 1)]
    for number in range(7):
        work.append((Text([(10, 20), (48 + 4 * number, 4)], 2 + number).sharing(first, 20), 1))
    others = [Text([(90, 6)], 20), Text([(100, 3), (110, 6)], 21)]
    assert compute(cache, [(others[0], 4), (others[1], 7)]) <= 1e-5
    work.insert(2, (others[0], 1))
    work.insert(5, (others[1], 1))
    for _ in range(2):
        assert compute(cache, work) <= 1e-5
    assert compute(cache, [*work[3:5], *work[:2], *work[6:]]) <= 1e-5


def test_a_run_may_be_the_first_of_one_and_the_second_of_another(cache: Cache) -> None:
    """Both see the run (10, 5), which only one of them begins with."""
    first = Text([(10, 5), (30, 2)], 1)
    assert compute(cache, [(first, 5)]) <= 1e-5
    second = Text([(20, 2), (10, 5), (40, 2)], 2)
    second.keys_values[2:7] = first.keys_values[:5]
    assert compute(cache, [(second, 2)]) <= 1e-5
    second.cached = 7
    assert compute(cache, [(second, 1), (first, 1)]) <= 1e-5
    assert compute(cache, [(first, 1), (second, 1)]) <= 1e-5


def test_decode_and_prefill_with_and_without_a_past_in_one_step(cache: Cache) -> None:
    far, near, late, new = (
        Text([(0, 9), (60, 12)], 1),
        Text([(20, 30)], 2),
        Text([(80, 2), (90, 2), (100, 20)], 3),
        Text([(120, 15)], 4),
    )
    assert compute(cache, [(far, 10), (near, 13), (late, 3)]) <= 1e-5
    assert compute(cache, [(far, 1), (near, 1), (late, 8), (new, 15)]) <= 1e-5
    assert compute(cache, [(late, 1), (far, 5), (near, 1)]) <= 1e-5


def test_few_tokens_of_several_sequences_in_one_step(cache: Cache) -> None:
    """As drafts have them: as many of some sequences, more of others, one of the rest."""
    texts = [Text([(20 * index, 9 + index)], seed=index) for index in range(7)]
    assert compute(cache, [(text, 4 + index) for index, text in enumerate(texts)]) <= 2e-6
    assert compute(cache, list(zip(texts, (2, 3, 1, 2, 3, 1, 5), strict=True))) <= 2e-6
    assert compute(cache, [(text, 2) for text in texts[:3]]) <= 2e-6


def test_very_different_scores_are_merged_without_overflow(cache: Cache) -> None:
    text = Text([(0, 4), (10, 4), (20, 4)], 1)
    text.keys_values[2:4, 0] *= 300
    text.keys_values[8:, 0] *= 300
    assert compute(cache, [(text, 5)]) <= 1e-3  # scores of several hundred, to which fp32 adds 3e-5 each
    assert compute(cache, [(text, 4)]) <= 1e-3
    assert compute(cache, [(text, 1)]) <= 1e-3


def test_a_window_reads_nothing_that_it_has_left_behind() -> None:
    """Neither one token nor several: rows that no query sees any more may hold anything."""
    cache = Cache(4)
    text = Text([(0, 3), (20, 5), (40, 20)], 1)
    assert compute(cache, [(text, 12)]) <= 1e-5
    cache._stored[..., [*range(3), *range(20, 25)], :] = NAN  # positions 0 to 7, and 12 sees from 9 on
    for length in (1, 9, 1):
        assert compute(cache, [(text, length)]) <= 1e-5


def test_a_window_that_does_not_show_changes_no_step() -> None:
    plan = StepPlan([0] * 13, [Segment(0, 12, [(0, 12)]), Segment(15, 1, [(20, 16)])], [])
    assert prepare(plan, CPU, window=16).near is None
    near = prepare(plan, CPU, window=15).near
    assert near is not None
    assert [(view.start, view.length, view.mask) for view in near.looks.views] == [
        (21, 15, None),
        (0, 12, None),
    ]


# --- any layout -----------------------------------------------------------------------------------


class Layout:
    """Sequences in random runs, some of them with the beginning of an earlier one; steps in random order."""

    def __init__(self, seed: int) -> None:
        self._chance = chance.Random(seed)
        self._free = list(range(ROWS))
        self.texts: list[Text] = []
        for number in range(self._chance.randint(1, 8)):
            if len(self._free) > 20:
                self.texts.append(self._text(100 * seed + number))

    def _text(self, seed: int) -> Text:
        if self.texts and self._chance.random() < 0.6:
            source = self._chance.choice(self.texts)
            shared = self._chance.randint(1, source.length)
            runs = parts(source.runs, 0, shared) + self._take(self._chance.randint(1, 8))
            text = Text(runs, seed)
            text.keys_values[:shared] = source.keys_values[:shared]
            return text
        return Text(self._take(self._chance.randint(1, 20)), seed)

    def _take(self, count: int) -> list[Run]:
        runs = []
        while count:
            first = self._chance.choice(self._free)
            most = self._chance.randint(1, count)
            taken = 0
            while taken < most and first + taken in self._free:
                self._free.remove(first + taken)
                taken += 1
            runs.append((first, taken))
            count -= taken
        return runs

    def steps(self) -> Iterator[list[tuple[Text, int]]]:
        while left := [text for text in self.texts if text.cached < text.length]:
            chosen = self._chance.sample(left, self._chance.randint(1, len(left)))
            yield [(text, self._length(text)) for text in chosen]

    def _length(self, text: Text) -> int:
        most = text.length - text.cached
        return 1 if self._chance.random() < 0.5 else self._chance.randint(1, most)


@pytest.mark.slow
@settings(max_examples=80)
@given(seed=st.integers(0, 2**32), window=st.one_of(st.none(), st.integers(1, 24)))
def test_any_layout_and_any_steps_give_every_token_what_it_may_see(seed: int, window: int | None) -> None:
    """Those that begin alike write the same keys and values to the same rows, whoever comes first."""
    cache = Cache(window)
    for work in Layout(seed).steps():
        assert compute(cache, work) <= 1e-5


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("rows", "length", "scores"), [(1, 50, 2**24), (37, 50, 2**24), (37, 50, 1000)])
def test_plain_attention_is_the_fast_one_however_many_rows_it_takes_at_a_time(
    rows: int, length: int, scores: int, masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain one is for CUDA devices."""
    monkeypatch.setattr(module, "SCORES", scores)
    queries = random(rows, KV_HEADS * GROUP, WIDTH, seed=2)
    keys, values = random(length, 2, KV_HEADS, WIDTH, seed=3).unbind(1)
    mask = None
    if masked:
        mask = torch.zeros(rows, length).masked_fill_(random(rows, length, seed=4) > 0.5, float("-inf"))
    found = module._plain(queries, keys, values, WIDTH**-0.5, mask)
    everything = torch.zeros(rows, length) if mask is None else mask
    wanted = module._each(queries, keys, values, everything)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("rows", [2, 63, 64, 65, 300])
def test_causal_attention_is_that_with_a_mask_however_many_rows_there_are(rows: int) -> None:
    projected = random(rows, KV_HEADS * GROUP + 2 * KV_HEADS, WIDTH, seed=5)
    queries = projected.narrow(1, 0, KV_HEADS * GROUP)
    keys, values = projected.narrow(1, KV_HEADS * GROUP, 2 * KV_HEADS).unflatten(1, (2, KV_HEADS)).unbind(1)
    later = torch.full((rows, rows), float("-inf")).triu_(1)
    found = module._causal(queries, keys, values)
    wanted = module._each(queries, keys, values, later)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() < 1e-5


def test_copies_move_rows_of_every_layer_one_after_the_other() -> None:
    copies = [Copy(0, 20, 4), Copy(4, 24, 4), Copy(20, 40, 8), Copy(41, 0, 2)]
    check_copies(Cache(), copies)


def test_a_copied_beginning_is_seen_like_the_first_one(cache: Cache) -> None:
    """A prefix of 20 rows is copied in part, and the rest of a sequence is computed after the copy."""
    first = Text([(10, 30)], 1)
    assert compute(cache, [(first, 20)]) <= 1e-5
    second = Text([(50, 10), (80, 20)], 2).sharing(first, 14)
    cache.copy([Copy(10, 50, 10), Copy(20, 80, 4)])
    assert compute(cache, [(second, 6), (first, 1)]) <= 1e-5
    assert compute(cache, [(second, 1), (first, 1)]) <= 1e-5


def test_neighbours_that_go_to_neighbours_are_copied_at_once() -> None:
    copies = [Copy(0, 20, 4), Copy(4, 24, 4), Copy(8, 28, 2), Copy(10, 40, 1), Copy(11, 42, 1)]
    assert module._joined(copies) == [(0, 20, 10), (10, 40, 1), (11, 42, 1)]


@pytest.mark.parametrize(
    "copies",
    [
        [Copy(0, 4, 4), Copy(4, 8, 4)],  # the second copies what the first has written
        [Copy(8, 4, 4), Copy(12, 8, 4)],  # the second overwrites what the first has copied
        [Copy(0, 4, 4), Copy(4, 8, 4), Copy(8, 12, 4)],
        [Copy(0, 10, 4), Copy(4, 14, 4), Copy(8, 18, 4)],  # clear of each other up to the third
    ],
)
def test_neighbours_that_would_overlap_are_copied_in_order(copies: list[Copy]) -> None:
    check_copies(Cache(), copies)


@given(
    copies=st.lists(
        st.builds(Copy, st.integers(0, 8).map((4).__mul__), st.integers(0, 8).map((4).__mul__), st.just(4)),
        max_size=8,
    )
)
def test_any_copies_have_the_effect_of_one_after_the_other(copies: list[Copy]) -> None:
    check_copies(Cache(), [copy for copy in copies if copy.source != copy.target])


def check_copies(cache: Cache, copies: list[Copy]) -> None:
    cache._stored.copy_(random(*cache._stored.shape))
    expected = cache._stored.clone()
    for source, target, count in ((copy.source, copy.target, copy.count) for copy in copies):
        expected[..., target : target + count, :] = expected[..., source : source + count, :].clone()
    cache.copy(copies)
    assert torch.equal(cache._stored, expected)


def test_the_cache_measures_itself() -> None:
    assert Cache().nbytes == 2 * ROWS * 2 * KV_HEADS * WIDTH * 4


def test_tokens_are_taken_a_whole_window_at_a_time() -> None:
    """Of so many the last one still sees the first; more views than that would be more work."""
    step = prepare(StepPlan([0] * 12, [Segment(0, 12, [(0, 12)])], []), CPU, window=4)
    assert step.near is not None
    views = step.near.looks.views
    assert [(view.first, view.last) for view in views if view.causal] == [(0, 4), (4, 8), (8, 12)]
    before = [(view.first, view.last, view.start, view.length) for view in views if not view.causal]
    assert before == [(4, 7, 1, 3), (8, 11, 5, 3)]
