"""Random times by token: distribution, independence of all else, and what a rounding may change."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cortex.neuron.engine.race import keys, winner

HOST = torch.device("cpu")


def chances(count: int, seed: int = 0) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.getrandbits(64) for _ in range(count)]


def winners(probabilities: list[float], numbers: list[int], first: int = 0) -> list[int]:
    rows = torch.tensor(probabilities).expand(len(numbers), -1)
    ids = torch.arange(first, first + len(probabilities))
    found: list[int] = winner(rows, ids, keys(numbers, HOST)).tolist()
    return found


@pytest.mark.parametrize("first", [0, 151_000])
@pytest.mark.parametrize("numbers", [chances(20_000), list(range(20_000))], ids=["random", "counted"])
def test_each_token_wins_as_often_as_its_probability_says(numbers: list[int], first: int) -> None:
    probabilities = [0.5, 0.3, 0.15, 0.04, 0.009, 0.001]
    found = winners(probabilities, numbers, first)
    for place, probability in enumerate(probabilities):
        scatter = math.sqrt(probability * (1 - probability) / len(numbers))
        assert found.count(place) / len(numbers) == pytest.approx(probability, abs=4.5 * scatter)


def test_a_long_tail_wins_as_often_as_all_of_it_together() -> None:
    tail = 50_000
    numbers = chances(2000)
    found = winners([0.9] + [0.1 / tail] * tail, numbers)
    rare = [place for place in found if place]
    assert len(rare) / len(numbers) == pytest.approx(0.1, abs=0.03)
    assert len(set(rare)) > len(rare) - 3
    assert sum(rare) / len(rare) == pytest.approx(tail / 2, rel=0.1)


def test_who_wins_says_nothing_of_who_wins_with_the_next_number() -> None:
    found = winners([0.5, 0.5], chances(20_000))
    repeats = sum(a == b for a, b in itertools.pairwise(found))
    assert repeats / len(found) == pytest.approx(0.5, abs=0.02)


@given(st.permutations(range(40)), st.integers(0, 2**64 - 1), st.integers(1, 40))
def test_neither_order_nor_who_does_not_run_makes_a_difference(
    order: list[int], chance: int, running: int
) -> None:
    probabilities = torch.rand(40, generator=torch.Generator().manual_seed(1))
    probabilities[running:] = 0
    whole = winner(probabilities.unsqueeze(0), torch.arange(40), keys([chance], HOST))
    ids = torch.tensor(order)
    place = winner(probabilities[ids].unsqueeze(0), ids.unsqueeze(0), keys([chance], HOST))
    few = winner(probabilities[:running].unsqueeze(0), torch.arange(running), keys([chance], HOST))
    assert ids[place].equal(whole)
    assert few.equal(whole)


@pytest.mark.parametrize("chance", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, 2**64 - 1])
def test_any_number_of_64_bits_is_a_chance(chance: int) -> None:
    assert winners([0.0, 1.0, 0.0], [chance]) == [1]
