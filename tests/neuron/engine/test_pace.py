"""How much of a prompt goes into a step beside those who decode."""

from __future__ import annotations

import pytest

from cortex.neuron.engine.pace import FIRST, GROW, LEAST, SHRINK, STRETCH, Pace

DECODE, FIXED, PREFILL = 0.020, 0.005, 0.0002
"""Seconds of a step that only decodes, of having a prompt in it at all, and of each of its tokens."""


def run(pace: Pace, steps: int = 30, *, decoding: int = 4, prefill: float = PREFILL) -> int:
    """Steps on a machine with these costs, each with all that the pace allows; the last budget."""
    for _ in range(steps):
        pace.made(DECODE, decoding, 0)
        tokens = pace.budget(decoding)
        pace.made(DECODE + FIXED + tokens * prefill, decoding, tokens)
    return pace.budget(decoding)


def test_alone_a_prompt_gets_all_that_a_step_takes() -> None:
    assert Pace(512).budget(0) == 512
    learned = Pace(512)
    run(learned)
    assert learned.budget(0) == 512


def test_as_long_as_nothing_is_known_it_gets_little() -> None:
    pace = Pace(512)
    assert pace.budget(1) == FIRST
    pace.made(9.0, 1, FIRST)
    assert pace.budget(1) == FIRST, "nobody knows yet whether that is long"
    assert Pace(16).budget(1) == 16


def test_a_step_with_a_prompt_in_it_comes_to_take_so_many_times_one_without() -> None:
    budget = run(Pace(512))
    assert (DECODE + FIXED + budget * PREFILL) / DECODE == pytest.approx(STRETCH, rel=0.02)


@pytest.mark.parametrize(("prefill", "budget"), [(1.0, LEAST), (1e-9, 512)])
def test_the_budget_has_a_least_and_a_most(prefill: float, budget: int) -> None:
    assert run(Pace(512), prefill=prefill) == budget


def test_a_most_that_is_smaller_than_the_least_is_never_exceeded() -> None:
    pace = Pace(3)
    run(pace, prefill=1.0)
    assert [pace.budget(decoding) for decoding in (0, 1, 8)] == [3, 3, 3]


def test_it_follows_a_machine_that_becomes_slower_and_forgets_one_bad_step() -> None:
    pace = Pace(512)
    before = run(pace)
    pace.made(10.0, 4, before)
    assert pace.budget(4) == int(before * SHRINK), "somebody else took the cores"
    assert run(pace, 10) == pytest.approx(before, rel=0.03)
    slower = run(pace, prefill=4 * PREFILL)
    assert (DECODE + FIXED + slower * 4 * PREFILL) / DECODE == pytest.approx(STRETCH, rel=0.05)


def test_a_chunk_grows_step_by_step() -> None:
    pace = Pace(512)
    pace.made(DECODE, 4, 0)
    pace.made(DECODE, 4, FIRST)
    assert pace.budget(4) == int(FIRST * GROW)


def test_the_gaps_of_a_full_batch_are_the_measure_for_a_smaller_one() -> None:
    pace = Pace(512)
    pace.made(2 * DECODE, 8, 0)
    budget = run(pace)
    assert (DECODE + FIXED + budget * PREFILL) / (2 * DECODE) == pytest.approx(STRETCH, rel=0.02)


def test_the_short_end_of_a_prompt_makes_no_chunk_smaller_but_a_slow_one_does() -> None:
    pace = Pace(512)
    before = run(pace)
    pace.made(DECODE, 4, 3)
    assert pace.budget(4) == before
    pace.made(10.0, 4, before // 2)
    assert pace.budget(4) < before // 2


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    pace = Pace(512)
    for _ in range(3):
        pace.made(0.0, 1, 0)
        pace.made(0.0, 1, 100)
    assert LEAST <= pace.budget(1) <= 512
