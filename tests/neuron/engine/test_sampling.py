from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cortex.hookspecs import Sampling
from cortex.neuron.engine.sampler import CANDIDATES, sample

VOCAB = 3 * CANDIDATES[0]


def settings(**changes: Any) -> Sampling:
    return Sampling(max_tokens=1, **changes)


def logits(rows: int, vocab: int = VOCAB, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


def drawn(row: Tensor, setting: Sampling, draws: Sequence[float]) -> list[int | None]:
    return sample(row.expand(len(draws), -1).clone(), [setting] * len(draws), draws)


def allowed(row: Tensor, setting: Sampling) -> set[int]:
    """The tokens that may come, by the plain reading of the settings in fp64."""
    scores = row.double() / setting.temperature
    order = scores.argsort(descending=True, stable=True).tolist()
    if setting.top_k > 0:
        order = order[: setting.top_k]
    probabilities = scores[order].softmax(0)
    kept, before = [], 0.0
    for token, probability in zip(order, probabilities.tolist(), strict=True):
        if before >= setting.top_p or probability < setting.min_p * float(probabilities[0]):
            break
        kept.append(token)
        before += probability
    return set(kept or order[:1])


def test_temperature_zero_takes_the_likeliest_whatever_else_is_set() -> None:
    rows = logits(5)
    chosen = sample(rows, [settings(temperature=0, top_k=50, top_p=0.9)] * 5, [0.99] * 5)
    assert chosen == rows.argmax(-1).tolist()


@pytest.mark.parametrize(
    "setting",
    [
        settings(temperature=0.5),
        settings(temperature=1.5, min_p=0.02),
        settings(temperature=1.0, top_k=5),
        settings(temperature=1.0, top_k=CANDIDATES[0] + 10, top_p=0.9),
        settings(temperature=0.7, top_p=0.6),
        settings(temperature=8.0, top_p=0.95),
        settings(temperature=1.0, top_k=40, top_p=0.8, min_p=0.05),
        settings(temperature=1.0, top_p=0.0),
        settings(temperature=1.0, min_p=1.0),
        settings(temperature=1e-30),
    ],
    ids=str,
)
def test_exactly_the_allowed_tokens_come_and_each_as_often_as_it_should(setting: Sampling) -> None:
    row = logits(1)[0]
    may = allowed(row, setting)
    count = 4000
    chosen = drawn(row, setting, [(index + 0.5) / count for index in range(count)])
    frequencies = {token: chosen.count(token) / count for token in set(chosen) if token is not None}
    assert set(frequencies) <= may
    order = sorted(may)
    share = (row[order].double() / setting.temperature).softmax(0)
    for token, expected in zip(order, share.tolist(), strict=True):
        assert frequencies.get(token, 0.0) == pytest.approx(expected, abs=2 / count)


@given(
    draws=st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 20.0]),
    top_k=st.sampled_from([0, 1, 7, 400]),
    top_p=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
)
def test_a_row_does_not_depend_on_its_batch_mates(
    draws: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    rows = logits(len(draws) + 3)
    setting = settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    mates = [settings(temperature=0), settings(temperature=9.0, top_p=0.99), settings(temperature=1.0)]
    together = sample(rows, [setting] * len(draws) + mates, [*draws, 0.1, 0.2, 0.3])
    alone = [sample(rows[i : i + 1], [setting], [draw])[0] for i, draw in enumerate(draws)]
    assert together[: len(draws)] == alone


@pytest.mark.parametrize("draw", [0.0, math.nextafter(1, 0)])
@pytest.mark.parametrize("setting", [settings(), settings(top_k=3), settings(min_p=0.5)], ids=str)
def test_the_ends_of_chance_never_give_an_impossible_token(setting: Sampling, draw: float) -> None:
    row = torch.full((VOCAB,), float("-inf"))
    row[torch.tensor([5, 70, 300])] = torch.tensor([1.0, 2.0, 1.5])
    assert drawn(row, setting, [draw])[0] in {5, 70, 300}


def test_the_same_seed_gives_the_same_text() -> None:
    rows = logits(1)

    def text(seed: int) -> list[int | None]:
        chance = random.Random(seed)
        return [sample(rows, [settings(top_p=0.9)], [chance.random()])[0] for _ in range(20)]

    assert text(4) == text(4)
    assert text(4) != text(5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_give_no_token_and_disturb_nobody(bad: float, temperature: float) -> None:
    rows = logits(3)
    rows[1, 17] = bad
    for top_p in (1.0, 0.9):
        setting = settings(temperature=temperature, top_p=top_p)
        chosen = sample(rows, [setting] * 3, [0.5] * 3)
        assert chosen[1] is None
        assert chosen[0] == sample(rows[:1], [setting], [0.5])[0]
        assert chosen[2] is not None


def test_a_row_of_nothing_possible_gives_no_token() -> None:
    assert sample(torch.full((1, 8), float("-inf")), [settings()], [0.5]) == [None]


def test_a_large_flat_vocabulary_is_drawn_from_as_far_as_top_p_reaches() -> None:
    row = logits(1, vocab=3 * CANDIDATES[1], spread=0.5)[0]
    setting = settings(top_p=0.98)
    may = allowed(row, setting)
    assert len(may) > CANDIDATES[1]
    chosen = set(drawn(row, setting, [0.0, 0.3, 0.9, 0.999999]))
    assert chosen <= may
    assert len(chosen) == 4


def test_a_vocabulary_smaller_than_the_candidates_works() -> None:
    assert drawn(torch.zeros(7), settings(top_k=3), [0.0, 0.5, 0.999]) != [None] * 3
