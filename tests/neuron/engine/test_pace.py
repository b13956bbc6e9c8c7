"""How much of a prompt goes into a step beside those who decode."""

from __future__ import annotations

import pytest

from cortex.neuron.engine.pace import LEAST, STRETCH, UNKNOWN, Pace

DECODE, PREFILL = 0.020, 0.0002
"""Seconds of a step that only decodes, and of a prompt's token beside it."""


def learned(most: int = 512, *, decode: float = DECODE, prefill: float = PREFILL) -> Pace:
    """Has seen a machine for a while."""
    pace = Pace(most)
    for _ in range(30):
        pace.made(decode, 4, 0)
        pace.made(decode + 100 * prefill, 4, 100)
    return pace


def test_alone_a_prompt_gets_all_that_a_step_takes() -> None:
    assert Pace(512).budget(0) == learned().budget(0) == 512


def test_as_long_as_nothing_is_known_it_gets_little() -> None:
    pace = Pace(512)
    assert pace.budget(1) == UNKNOWN
    pace.made(DECODE, 1, 0)
    assert pace.budget(1) == UNKNOWN, "what a prompt's token costs is still unknown"
    assert Pace(16).budget(1) == 16


def test_a_step_with_a_prompt_in_it_takes_about_so_many_times_one_without() -> None:
    budget = learned().budget(4)
    assert (DECODE + budget * PREFILL) / DECODE == pytest.approx(STRETCH, rel=0.02)


@pytest.mark.parametrize(("prefill", "budget"), [(1.0, LEAST), (1e-9, 512)])
def test_the_budget_has_a_least_and_a_most(prefill: float, budget: int) -> None:
    assert learned(prefill=prefill).budget(4) == budget


def test_a_chunk_that_is_smaller_than_the_least_is_never_exceeded() -> None:
    pace = Pace(3)
    for _ in range(5):
        pace.made(DECODE, 1, 0)
        pace.made(DECODE * 50, 1, 3)
    assert [pace.budget(decoding) for decoding in (0, 1, 8)] == [3, 3, 3]


def test_it_follows_a_machine_that_becomes_slower_and_forgets_one_bad_step() -> None:
    pace = learned()
    before = pace.budget(4)
    pace.made(DECODE + 100 * PREFILL * 20, 4, 100)
    assert pace.budget(4) < before / 2, "somebody else took the cores"
    for _ in range(20):
        pace.made(DECODE + 100 * PREFILL, 4, 100)
    assert pace.budget(4) == pytest.approx(before, rel=0.02)
    for _ in range(20):
        pace.made(DECODE + 100 * PREFILL * 4, 4, 100)
    assert pace.budget(4) == pytest.approx(before / 4, rel=0.1)


def test_prefill_alone_teaches_what_a_token_costs() -> None:
    pace = Pace(512)
    pace.made(512 * PREFILL, 0, 512)
    pace.made(DECODE, 1, 0)
    assert pace.budget(1) == int((STRETCH - 1) * DECODE / PREFILL)


def test_the_gaps_of_a_full_batch_are_the_measure_for_a_smaller_one() -> None:
    pace = learned()
    for _ in range(30):
        pace.made(2 * DECODE, 8, 0)
    assert pace.budget(4) == int((STRETCH * 2 * DECODE - DECODE) / PREFILL), "what eight would wait, four may"
    assert pace.budget(7) == int((STRETCH - 1) * 2 * DECODE / PREFILL), "seven cost about what eight do"


def test_a_handful_of_tokens_teaches_nothing() -> None:
    """Most of the time of such a step is not theirs."""
    pace = learned()
    before = pace.budget(1)
    pace.made(10.0, 1, LEAST - 1)
    assert pace.budget(1) == before


def test_a_step_that_was_faster_than_decode_does_not_make_prefill_free() -> None:
    pace = learned()
    for _ in range(50):
        pace.made(DECODE / 2, 4, 100)
    assert LEAST <= pace.budget(4) <= 512
    assert pace._prefill is not None
    assert pace._prefill > 0


def test_a_clock_that_stands_still_breaks_nothing() -> None:
    pace = Pace(512)
    for _ in range(3):
        pace.made(0.0, 1, 0)
        pace.made(0.0, 1, 100)
    assert pace.budget(1) == LEAST
