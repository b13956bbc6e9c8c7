"""How much of a prompt goes into a step beside those who decode."""

from __future__ import annotations

import random

import pytest

from cortex.neuron.engine.pace import FEW, FIRST, JUMP, LEAST, ROUND, STRETCH, UNPROVEN, Pace

LAYERS, EVEN = 30, 3000
DECODE = 0.030
"""Seconds in which a full batch decodes; half a batch takes less."""
HALF_BATCH = 0.020
WORK = 0.002
"""Seconds of a token of a long prompt without a context, in all layers."""


def rest(pace: Pace, decoding: int, seconds: float) -> None:
    """A step that only decodes."""
    pace.made(decoding, 0, seconds)


def prefill(pace: Pace, tokens: int = 512, context: int = 0, work: float = WORK) -> None:
    """A step in which nobody decodes."""
    amount = pace.work(tokens, context)
    pace.made(0, amount, amount * work)


def learned(most: int = 512) -> Pace:
    """What knows the costs above."""
    pace = Pace(most, LAYERS, EVEN)
    rest(pace, 8, DECODE)
    rest(pace, 4, HALF_BATCH)
    prefill(pace)
    return pace


def long_prompt(
    pace: Pace, tokens: int, *, work: float = WORK, noise: float = 0.0
) -> tuple[list[float], int, float]:
    """A prompt beside four who decode: seconds of every step, its chunks, and the part of the time that its
    layers got.
    """
    chance = random.Random(1)

    def about(seconds: float) -> float:
        return seconds * (1 + noise * chance.uniform(-1, 1))

    steps, chunks, got, context = [], 0, 0.0, 0
    while context < tokens:
        length = pace.chunk(pace.spare(4), tokens - context, context)
        amount, passed = pace.work(length, context), 0
        while passed < LAYERS:
            decode = about(HALF_BATCH)
            pace.made(4, 0, decode, alone=False)
            layers = min(LAYERS - passed, max(1, pace.passes(pace.left(4, decode), amount)))
            apart = about(amount * layers * work / LAYERS)
            pace.passed(amount, layers, apart)
            steps.append(decode + apart)
            got += apart
            passed += layers
        context += length
        chunks += 1
    return steps, chunks, got / sum(steps)


def test_alone_a_prompt_gets_all_that_a_step_takes() -> None:
    assert Pace(512, LAYERS, EVEN).most == 512


def test_of_each_number_that_decode_a_step_of_them_alone_comes_first() -> None:
    pace = Pace(512, LAYERS, EVEN)
    assert not pace.knows(4)
    assert pace.spare(4) == 0
    pace.made(4, 0, DECODE, alone=False)
    assert not pace.knows(4), "a chunk of somebody else passed layers in between"
    rest(pace, 4, DECODE)
    assert pace.knows(4)
    assert not pace.knows(5)


def test_what_is_left_beside_decode_goes_by_what_a_full_batch_takes() -> None:
    pace = learned()
    assert pace.spare(8) == pytest.approx((STRETCH - 1) * DECODE)
    assert pace.spare(4) == pytest.approx(STRETCH * DECODE - HALF_BATCH)
    assert pace.spare(6) == pytest.approx((STRETCH - 1) * DECODE), "of six nothing is known yet"
    assert pace.left(8, DECODE * 1.1) == pytest.approx((STRETCH - 1.1) * DECODE), "a slow pass leaves less"
    assert pace.left(8, DECODE * 10) == pytest.approx(LEAST * DECODE), "but never nothing"


@pytest.mark.parametrize("slow", [2, 10])
def test_a_slow_first_step_of_a_full_batch_is_forgotten_with_the_next(slow: float) -> None:
    """It is the likeliest one to be slow, and all turns beside fewer go by what a full batch takes."""
    pace = Pace(512, LAYERS, EVEN)
    rest(pace, 8, slow * DECODE)
    rest(pace, 4, HALF_BATCH)
    assert pace.left(4, HALF_BATCH) == pytest.approx(STRETCH * slow * DECODE - HALF_BATCH)
    rest(pace, 8, DECODE)
    assert pace.left(4, HALF_BATCH) == pytest.approx(STRETCH * DECODE - HALF_BATCH)
    for _ in range(100):
        rest(pace, 8, 2 * DECODE)
    assert pace.left(8, DECODE) == pytest.approx(STRETCH * 2 * DECODE - DECODE, rel=0.01), "if it stays slow"


def test_one_slow_step_of_a_full_batch_is_not_what_turns_go_by() -> None:
    pace = Pace(512, LAYERS, EVEN)
    rest(pace, 8, 10 * DECODE)
    for _ in range(UNPROVEN):
        rest(pace, 4, HALF_BATCH)
    assert pace.left(4, HALF_BATCH) == pytest.approx((STRETCH - 1) * HALF_BATCH)


def test_those_who_have_become_slow_do_not_stop_prefill() -> None:
    """Their contexts have grown since they decoded alone."""
    pace = learned()
    for _ in range(200):
        pace.made(4, 0, 3 * DECODE, alone=False)
    assert pace.spare(4) == pytest.approx(LEAST * 3 * DECODE, rel=0.01)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_long_prompt_gets_most_of_its_rate_and_lengthens_no_step_by_more_than_it_may(noise: float) -> None:
    steps, chunks, share = long_prompt(learned(), 6000, noise=noise)
    assert max(steps) <= STRETCH * DECODE * (1.1 + noise), "a third of a layer is over the time at most"
    assert sum(steps) / len(steps) <= STRETCH * DECODE * 1.05
    assert share > 0.55
    assert chunks < 6000 / 100, "chunks are long enough to be computed well"


def test_layers_that_cost_more_than_was_thought_are_found_out_within_a_chunk() -> None:
    slow = 6 * WORK
    pace = learned()
    steps, _, _ = long_prompt(pace, 2000, work=slow)
    assert max(steps[-20:]) <= STRETCH * DECODE * 1.2
    fast = learned()
    steps, _, share = long_prompt(fast, 6000, work=WORK / 6)
    assert share > 0.55
    assert max(steps) <= STRETCH * DECODE * 1.2


def test_a_layer_is_passed_if_there_is_almost_time_for_it() -> None:
    pace, layer = learned(), 100 * WORK / LAYERS
    assert [pace.passes(part * layer, 100) for part in (-1.0, 0.1, 0.6, 0.8, 1.6, 1.8)] == [0, 0, 0, 1, 1, 2]


def test_a_chunk_that_fills_a_step_passes_as_many_layers_as_there_is_time_for() -> None:
    """Of which none is left over: a part of a layer is time that nobody gets."""
    pace, seconds = learned(), 0.043
    dear = 4 * WORK / LAYERS
    for _ in range(40):
        pace.passed(100, 1, 100 * dear)
    length = pace.chunk(seconds, 100_000, 0)
    assert length * dear < seconds < (length + 2 * ROUND) * dear, "one layer, and as long as it may be"
    assert pace.passes(seconds, pace.work(length, 0)) == 1
    cheap = WORK / LAYERS / 4
    for _ in range(40):
        pace.passed(100, 1, 100 * cheap)
    length = pace.chunk(seconds, 100_000, 0)
    assert 512 * 0.8 < length <= 512
    assert pace.passes(seconds, pace.work(length, 0)) == round(seconds / (pace.work(length, 0) * cheap))


def test_a_bad_step_of_those_who_decode_counts_little() -> None:
    pace = learned()
    before = pace.spare(4)
    pace.made(4, 0, 100 * HALF_BATCH)
    assert pace.spare(4) == pytest.approx(before, rel=0.03)


def test_one_bad_step_counts_little() -> None:
    pace, amount = learned(), 100.0
    before = pace.passes(1.0, amount)
    pace.passed(amount, 1, 100.0)
    assert pace.passes(1.0, amount) >= before / JUMP
    pace = learned()
    pace.passed(amount, 1, 0.0)
    assert pace.passes(1.0, amount) <= before * JUMP


def test_as_long_as_nothing_is_known_a_chunk_is_short_and_nothing_is_promised_of_layers() -> None:
    pace = Pace(512, LAYERS, EVEN)
    rest(pace, 1, DECODE)
    assert pace.chunk(pace.spare(1), 6000, 0) <= FIRST
    assert pace.passes(pace.spare(1), 100.0) == 0
    assert pace.beside(1.0) is None
    assert Pace(16, LAYERS, EVEN).chunk(1.0, 6000, 0) == 16


def test_chunks_are_alike_and_no_longer_than_what_is_left_or_than_a_step_takes() -> None:
    pace = learned()
    seconds = pace.spare(4)
    usual = pace.chunk(seconds, 100_000, 0)
    assert seconds / 3 < WORK / LAYERS * pace.work(usual, 0) < seconds
    assert pace.chunk(seconds, usual + 10, 0) == -(-(usual + 10) // 2 // ROUND) * ROUND, (
        "and not so many and ten"
    )
    assert pace.chunk(seconds, 7, 0) == 7
    assert pace.chunk(1e9, 100_000, 0) == 512
    assert pace.chunk(1e-9, 100_000, 0) == ROUND
    assert pace.chunk(seconds, 100_000, 60_000) < usual, "each token costs more there"


def test_a_context_makes_prompts_dearer_and_few_tokens_at_a_time_more_so() -> None:
    pace = learned()
    assert pace.work(100, EVEN - 50) == pytest.approx(2 * 100)
    assert pace.work_beside(100, EVEN - 50) == pytest.approx((1 + FEW) * 100)
    guess = pace.beside(40)
    assert guess == pytest.approx(40 * WORK), "before it was seen"
    for _ in range(20):
        pace.made(4, 40, HALF_BATCH + 40 * 3 * WORK)
    assert pace.beside(40) == pytest.approx(40 * 3 * WORK, rel=0.01)


def test_a_model_without_attention_has_no_context_to_pay_for() -> None:
    assert Pace(512, LAYERS, float("inf")).work(100, 5000) == 100


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    pace = Pace(512, LAYERS, EVEN)
    rest(pace, 4, 0.0)
    for _ in range(3):
        pace.made(4, 10, 0.0)
        pace.passed(10, 2, 0.0)
        assert pace.passes(pace.spare(4), 10.0) == 0, "what costs nothing is not known"
        assert ROUND <= pace.chunk(pace.spare(4), 6000, 0) <= 512
