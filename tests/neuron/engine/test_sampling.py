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
from cortex.neuron.engine.sampler import CANDIDATES, Row, choose
from cortex.neuron.engine.sequence import Tally

VOCAB = 3 * CANDIDATES[0]


def settings(**changes: Any) -> Sampling:
    return Sampling(max_tokens=1, **changes)


def logits(rows: int, vocab: int = VOCAB, spread: float = 2.0) -> Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))


def row_for(
    setting: Sampling, chance: int = 5, prompt: Sequence[int] = (), reply: Sequence[int] = (), **more: Any
) -> Row:
    tally = Tally(list(prompt) if setting.penalises else [])
    for token in reply if setting.penalises else ():
        tally.add(token)
    return Row(setting, chance, tally.ids, tally.counts, **more)


def tokens(rows: Tensor, settings: Sequence[Sampling], chances: Sequence[int]) -> list[int | None]:
    """What is chosen; `rows` stay as they are."""
    asked = [row_for(setting, chance) for setting, chance in zip(settings, chances, strict=True)]
    return [None if found is None else found[0] for found in choose(rows.clone(), asked).read()]


def numbers(count: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.getrandbits(64) for _ in range(count)]


def drawn(row: Tensor, setting: Sampling, chances: Sequence[int]) -> list[int | None]:
    return tokens(row.expand(len(chances), -1), [setting] * len(chances), chances)


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
    chosen = tokens(rows, [settings(temperature=0, top_k=50, top_p=0.9)] * 5, numbers(5))
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
    count = 6000
    chosen = drawn(row, setting, numbers(count))
    frequencies = {token: chosen.count(token) / count for token in set(chosen) if token is not None}
    assert set(frequencies) <= may
    order = sorted(may)
    share = (row[order].double() / setting.temperature).softmax(0)
    for token, expected in zip(order, share.tolist(), strict=True):
        scatter = math.sqrt(expected * (1 - expected) / count)
        assert frequencies.get(token, 0.0) == pytest.approx(expected, abs=5 * scatter + 2 / count)


@given(
    chances=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=6),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 20.0]),
    top_k=st.sampled_from([0, 1, 7, 400]),
    top_p=st.sampled_from([0.0, 0.5, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.1]),
)
def test_a_row_does_not_depend_on_its_batch_mates(
    chances: list[int], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    rows = logits(len(chances) + 3)
    setting = settings(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    mates = [settings(temperature=0), settings(temperature=9.0, top_p=0.99), settings(temperature=1.0)]
    together = tokens(rows, [setting] * len(chances) + mates, [*chances, 1, 2, 3])
    alone = [tokens(rows[i : i + 1], [setting], [chance])[0] for i, chance in enumerate(chances)]
    assert together[: len(chances)] == alone


@pytest.mark.parametrize("chance", [0, 1, 2**64 - 1, 2**63, 2**32 - 1, 2**31])
@pytest.mark.parametrize("setting", [settings(), settings(top_k=3), settings(min_p=0.5)], ids=str)
def test_the_ends_of_chance_never_give_an_impossible_token(setting: Sampling, chance: int) -> None:
    row = torch.full((VOCAB,), float("-inf"))
    row[torch.tensor([5, 70, 300])] = torch.tensor([1.0, 2.0, 1.5])
    assert drawn(row, setting, [chance])[0] in {5, 70, 300}


def test_logits_that_differ_by_a_rounding_give_the_same_tokens() -> None:
    """As they do for one sequence beside others and alone, and a long tail of rare tokens is no reason."""
    row = logits(1, vocab=20_000, spread=3.0)[0]
    near = row + 1e-5 * logits(1, vocab=20_000)[0]
    for setting in (settings(), settings(top_p=0.999), settings(top_k=5000), settings(min_p=1e-4)):
        assert drawn(row, setting, numbers(300)) == drawn(near, setting, numbers(300))


def test_the_same_seed_gives_the_same_text() -> None:
    rows = logits(1)

    def text(seed: int) -> list[int | None]:
        chance = random.Random(seed)
        return [tokens(rows, [settings(top_p=0.9)], [chance.getrandbits(64)])[0] for _ in range(20)]

    assert text(4) == text(4)
    assert text(4) != text(5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_numbers_give_no_token_and_disturb_nobody(bad: float, temperature: float) -> None:
    rows = logits(3)
    rows[1, 17] = bad
    for top_p in (1.0, 0.9):
        setting = settings(temperature=temperature, top_p=top_p)
        chosen = tokens(rows, [setting] * 3, [5] * 3)
        assert chosen[1] is None
        assert chosen[0] == tokens(rows[:1], [setting], [5])[0]
        assert chosen[2] is not None


def test_a_row_of_nothing_possible_gives_no_token() -> None:
    assert tokens(torch.full((1, 8), float("-inf")), [settings()], [5]) == [None]


def test_a_large_flat_vocabulary_is_drawn_from_as_far_as_top_p_reaches() -> None:
    row = logits(1, vocab=3 * CANDIDATES[1], spread=0.5)[0]
    setting = settings(top_p=0.98)
    may = allowed(row, setting)
    assert len(may) > CANDIDATES[1]
    chosen = set(drawn(row, setting, numbers(20)))
    assert chosen <= may
    assert len(chosen) > 15


def test_a_vocabulary_smaller_than_the_candidates_works() -> None:
    assert drawn(torch.zeros(7), settings(top_k=3), numbers(3)) != [None] * 3


# --- what shifts the logits ---


def shifted(rows: Tensor, asked: Sequence[Row]) -> Tensor:
    """The logits that greedy rows choose from."""
    assert all(row.settings.temperature == 0 for row in asked)
    changed = rows.clone()
    chosen = choose(changed, asked).read()
    assert [found and found[0] for found in chosen] == changed.argmax(-1).tolist()
    return changed


def expected(row: Tensor, setting: Sampling, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    """Bias by its definition; repetition by transformers; presence and frequency by OpenAI's formula."""
    from transformers import RepetitionPenaltyLogitsProcessor

    scores = row.clone()
    for token, value in setting.logit_bias.items():
        scores[token] += value
    if setting.repetition_penalty != 1:
        penalty = RepetitionPenaltyLogitsProcessor(setting.repetition_penalty)
        scores = penalty(torch.tensor([[*prompt, *reply]]), scores.unsqueeze(0))[0]
    for token in set(reply):
        scores[token] -= setting.presence_penalty + setting.frequency_penalty * reply.count(token)
    return scores


PENALTIES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 0.8},
    {"frequency_penalty": -0.5},
    {"repetition_penalty": 1.1, "presence_penalty": -1.0, "frequency_penalty": 0.4},
    {"logit_bias": {3: 5.0, 60: -100.0}},
    {"logit_bias": {3: -5.0}, "repetition_penalty": 2.0, "frequency_penalty": 1.0},
]


def test_penalties_and_biases_of_a_mixed_batch_are_those_of_the_references() -> None:
    chance = random.Random(3)
    rows = logits(len(PENALTIES))
    asked, wanted = [], []
    for row, changes in zip(rows, PENALTIES, strict=True):
        prompt = [chance.randrange(100) for _ in range(40)]
        reply = [chance.randrange(100) for _ in range(25)]
        setting = settings(temperature=0, **changes)
        asked.append(row_for(setting, prompt=prompt, reply=reply))
        wanted.append(expected(row, setting, prompt, reply))
    assert torch.allclose(shifted(rows, asked), torch.stack(wanted), atol=1e-5)


def test_no_repetition_penalty_makes_values_that_are_not_numbers() -> None:
    rows = logits(2)
    tiny = settings(temperature=0, repetition_penalty=1e-39)
    found = shifted(rows, [row_for(tiny, prompt=range(50)), row_for(settings(temperature=0))])
    assert found.isfinite().all()
    assert int(found[0].argmax()) == int(rows[0, :50].argmax())


def test_presence_and_frequency_leave_alone_what_only_the_prompt_holds() -> None:
    rows = logits(1)
    setting = settings(temperature=0, presence_penalty=2.0, frequency_penalty=2.0)
    assert torch.equal(shifted(rows, [row_for(setting, prompt=[1, 2, 2])]), rows)


def test_penalties_count_for_chance_too() -> None:
    rows = torch.zeros(1, 8)
    setting = settings(presence_penalty=50.0)
    asked = [row_for(setting, chance, prompt=[0, 1], reply=[2, 3, 4, 5, 6, 7]) for chance in numbers(20)]
    assert {found[0] for found in choose(rows.repeat(20, 1), asked).read() if found} == {0, 1}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_forces_or_forbids_a_token(temperature: float) -> None:
    rows = logits(1)
    likeliest = int(rows[0].argmax())
    for chance in numbers(3):
        forced = settings(temperature=temperature, logit_bias={5: 100.0})
        assert tokens(rows, [forced], [chance]) == [5]
        forbidden = settings(temperature=temperature, logit_bias={likeliest: -1e9})
        assert tokens(rows, [forbidden], [chance]) != [likeliest]


def test_a_bias_on_what_is_no_token_does_nothing_and_reaches_no_other_row() -> None:
    rows = logits(3)
    odd = settings(temperature=0, logit_bias={-1: 100.0, VOCAB: 100.0, VOCAB + 4: 100.0})
    asked = [row_for(setting) for setting in (settings(temperature=0), odd, settings(temperature=0))]
    assert torch.equal(shifted(rows, asked), rows)


def test_withheld_stop_ids_do_not_come_even_if_nothing_else_is_likely() -> None:
    rows = torch.full((4, 8), -30.0)
    rows[:, [2, 5]] = torch.tensor([9.0, 8.0])
    held = settings(temperature=0, stop_ids=(2, 5, 900))
    drawn_held = settings(stop_ids=(2, 5))
    asked = [
        row_for(held, withhold=True),
        row_for(held),
        row_for(drawn_held, 3, withhold=True),
        row_for(settings(logit_bias={2: 100.0}, stop_ids=(2, 5)), 3, withhold=True),
    ]
    chosen = [found and found[0] for found in choose(rows, asked).read()]
    assert chosen[1] == 2
    assert not {2, 5} & {chosen[0], chosen[2], chosen[3]}


# --- log probabilities ---


def test_log_probabilities_are_those_of_the_model_whatever_shifts_the_choice() -> None:
    rows = logits(5)
    plain = torch.log_softmax(rows, -1)
    asked = [
        row_for(settings(temperature=0, logprobs=3)),
        row_for(settings(temperature=0)),
        row_for(settings(temperature=0.2, top_k=5, logprobs=0)),
        row_for(settings(temperature=3.0, logit_bias={9: 100.0}, logprobs=20)),
        row_for(settings(repetition_penalty=5.0, logprobs=1), prompt=range(50), reply=[1, 2]),
    ]
    chosen = choose(rows.clone(), asked).read()
    for index, (found, row) in enumerate(zip(chosen, asked, strict=True)):
        assert found is not None
        token, told = found
        if row.settings.logprobs is None:
            assert told is None
            continue
        assert told is not None
        assert told.id == token
        assert told.logprob == pytest.approx(float(plain[index, token]), abs=1e-6)
        values, ids = plain[index].topk(row.settings.logprobs)
        assert [id for id, _ in told.top] == ids.tolist()
        assert [value for _, value in told.top] == pytest.approx(values.tolist(), abs=1e-6)
    assert chosen[3] is not None
    assert chosen[3][0] == 9


def test_more_likeliest_tokens_than_there_are_tokens_are_all_of_them() -> None:
    (found,) = choose(torch.zeros(1, 5), [row_for(settings(logprobs=20))]).read()
    assert found is not None
    assert found[1] is not None
    assert len(found[1].top) == 5
    assert sum(math.exp(value) for _, value in found[1].top) == pytest.approx(1.0)


SETTINGS = st.builds(
    settings,
    temperature=st.sampled_from([0.0, 0.4, 1.0, 5.0]),
    top_k=st.sampled_from([0, 0, 3, 400]),
    top_p=st.sampled_from([1.0, 1.0, 0.5, 0.97]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.6]),
    frequency_penalty=st.sampled_from([0.0, -0.3]),
    logit_bias=st.sampled_from([{}, {4: 3.0, 5: -100.0}]),
    logprobs=st.sampled_from([None, 0, 2, 5]),
    stop_ids=st.sampled_from([(), (1, 2)]),
)
ROWS = st.builds(
    row_for,
    SETTINGS,
    st.integers(0, 2**64 - 1),
    st.lists(st.integers(0, 99), max_size=20),
    st.lists(st.integers(0, 99), max_size=20),
    withhold=st.booleans(),
)


@given(st.lists(ROWS, min_size=2, max_size=9), st.integers(0, 99))
def test_whatever_rows_a_batch_mixes_each_gets_what_it_gets_alone(asked: list[Row], seed: int) -> None:
    rows = 2.0 * torch.randn(len(asked), VOCAB, generator=torch.Generator().manual_seed(seed))
    together = choose(rows.clone(), asked).read()
    alone = [choose(rows[index : index + 1].clone(), [row]).read()[0] for index, row in enumerate(asked)]
    assert together == alone
