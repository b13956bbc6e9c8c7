"""What is drafted of how a sequence goes on, when drafts rest, and what becomes of them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.hookspecs import Sampling
from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.checkpoints import StateBooks
from cortex.neuron.engine.drafts import AT_ONCE, FIRST, GRAM, LONGEST_PAUSE, LOOKED_BACK, MOST, PAUSE, Drafter
from cortex.neuron.engine.messages import Generate
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.sequence import Sampled, Sequence

LINE = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]


def test_what_followed_the_same_three_tokens_the_last_time_is_drafted() -> None:
    drafter = Drafter()
    assert drafter.propose([*LINE, 20, 3, 4], 9) == []
    assert drafter.propose([*LINE, 20, 3, 4, 5], 9) == [6, 7]
    assert drafter.propose([*LINE, 20, 3, 4, 5, 30, 3, 4, 5], 9) == [30, 3], "the newest place counts"
    assert drafter.propose([*LINE, 20, 3, 4, 5, 30, 3, 4, 5, 99], 9) == []


def test_a_sequence_that_repeats_itself_is_drafted_from_its_own_end() -> None:
    assert Drafter().propose([5, 5, 5, 5], 9) == [5, 5]
    long = Drafter()
    long._length = MOST
    assert long.propose([1, 2, 1, 2, 1, 2, 1], 9) == [2, 1, 2, 1, 2, 1, 2]
    assert long.propose([1, 2, 1, 2, 1, 2, 1, 8, 9, 1, 2, 1], 5) == [8, 9, 1, 2, 1]
    assert Drafter().propose([1, 2, 1, 2, 1, 2, 1], 9) == [2, 1]
    assert Drafter().propose([5, 5, 5], 9) == []
    assert Drafter().propose([], 9) == []


def test_no_more_is_drafted_than_there_is_room_for() -> None:
    tokens = [*LINE, 3, 4, 5]
    assert [Drafter().propose(tokens, most) for most in (-3, 0, 1, 2)] == [[], [], [6], [6, 7]]


def test_drafts_grow_while_they_are_right_and_shrink_to_what_was() -> None:
    drafter, tokens = Drafter(), [*LINE, *LINE[:3]]
    lengths = []
    for _ in range(4):
        lengths.append(len(drafter.propose(tokens, 99)))
        drafter.judge(lengths[-1], lengths[-1], 0.1, len(tokens))
    assert lengths == [FIRST, 4, MOST, MOST]
    drafter.judge(MOST, 3, 0.1, len(tokens))
    assert len(drafter.propose(tokens, 99)) == 3


def test_drafts_that_lose_rest_for_longer_each_time_until_one_is_right() -> None:
    drafter, tokens = Drafter(), [*LINE, *LINE[:3]]
    pauses = []
    for _ in range(9):
        before = len(tokens)
        drafter.judge(FIRST, 0, 0.1, before)
        while not drafter.propose(tokens, 9):
            tokens += LINE
            tokens += LINE[:3]
        pauses.append(len(tokens) - before)
    assert pauses[0] in range(PAUSE, PAUSE + 15)
    assert pauses == sorted(pauses)
    assert pauses[-1] in range(LONGEST_PAUSE, LONGEST_PAUSE + 15)
    drafter.judge(FIRST, FIRST, 0.1, len(tokens))
    drafter.judge(FIRST, 0, 0.1, len(tokens))
    assert drafter.propose(tokens, 9), "one loss among gains is nothing"


def test_where_drafts_cost_as_much_as_steps_right_ones_rest_too() -> None:
    drafter, tokens = Drafter(), [*LINE, *LINE[:3]]
    assert drafter.propose(tokens, 9)
    drafter.judge(2, 1, 0.6, len(tokens))
    assert not drafter.propose([*tokens, 4], 9)


def test_of_a_long_prompt_the_end_is_looked_through() -> None:
    def proposed(tokens: list[int]) -> list[int]:
        drafter = Drafter()
        for _ in range(LOOKED_BACK // AT_ONCE - 1):
            assert drafter.propose(tokens, 9) == [], "so many tokens are looked through for one step"
        return drafter.propose(tokens, 9)

    assert proposed([*LINE, *range(100, 100 + LOOKED_BACK), 3, 4, 5]) == []
    assert proposed([*range(100, 100 + LOOKED_BACK), *LINE, 3, 4, 5]) == [6, 7]


@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(1, 9), max_size=20), st.integers(0, 9))
def test_every_draft_stands_in_the_sequence_after_its_last_three(
    tokens: list[int], cuts: list[int], most: int
) -> None:
    """However many tokens come between two questions."""
    drafter, count = Drafter(), 0
    for cut in [*cuts, 60]:
        count = min(len(tokens), count + cut)
        known = tokens[:count]
        draft = drafter.propose(known, most)
        assert len(draft) <= min(most, MOST)
        endless = [*known, *draft]
        said = [endless[at : at + GRAM + len(draft)] for at in range(count - GRAM)]
        places = [known[at : at + GRAM] == known[count - GRAM :] for at in range(count - GRAM)]
        assert bool(draft) == (count > GRAM and any(places) and most > 0)
        if draft:
            assert [*known[count - GRAM :], *draft] in said


# --- in the scheduler -----------------------------------------------------------------------------

STOP, SIZE = 9, 4


def drafting(*, blocks: int = 64, context: int = 100, most: int = 8) -> Scheduler:
    pool, pace = BlockPool(blocks, SIZE), Pace(64, 6, 1000)
    return Scheduler(pool, context=context, pace=pace, vocab=100, clock=lambda: 0.0, drafting=most)


def order(key: int, ids: list[int], max_tokens: int = 4, **sampling: Any) -> Generate:
    settings = Sampling(max_tokens=max_tokens, stop_ids=(STOP,), **sampling)
    return Generate(key=key, request_id=f"r{key}", ids=ids, sampling=settings)


def planned(made: Scheduler) -> Scheduled:
    scheduled = made.schedule()
    assert scheduled is not None
    return scheduled


def said(*tokens: int) -> list[Sampled]:
    return [(token, None) for token in tokens]


def step(made: Scheduler, token: int) -> None:
    """One whole step in which every row gives `token`."""
    scheduled = planned(made)
    made.complete(scheduled, said(*[token] * scheduled.rows))
    made.took(scheduled, 0.010 + 0.001 * scheduled.work)


AGAIN = [*range(20, 32), 20, 21, 22]
"""Whose next tokens are likely to be 23, 24, ..."""


def ready(made: Scheduler, max_tokens: int = 40, ids: list[int] = AGAIN, **sampling: Any) -> None:
    """A sequence that has said 23, alone, so that it is known what that takes."""
    assert made.add(order(1, ids, max_tokens, **sampling)) is None
    step(made, ids[3])
    step(made, ids[4])


def test_a_draft_is_computed_with_the_newest_token_and_what_is_right_of_it_counts() -> None:
    made = drafting()
    ready(made)
    scheduled = planned(made)
    assert scheduled.plan.ids == [24, 25, 26]
    assert scheduled.plan.wanted == [0, 1, 2]
    (segment,) = scheduled.plan.segments
    assert (segment.start, segment.length, segment.end) == (16, 3, 19)
    assert scheduled.rows == 3
    (output,) = made.complete(scheduled, said(25, 26, 27))
    assert (output.ids, output.finish) == ([25, 26, 27], None)
    scheduled = planned(made)
    assert scheduled.plan.ids == [27, 28, 29, 30, 31], "it has become longer"
    assert scheduled.plan.segments[0].start == 19
    (output,) = made.complete(scheduled, said(28, 77, 78, 79, 80))
    assert output.ids == [28, 77]
    scheduled = planned(made)
    assert (scheduled.plan.ids, scheduled.plan.segments[0].start) == ([77], 21)
    counts = made.take_counts()
    assert (counts.drafted, counts.accepted) == (6, 3)


def test_only_what_was_accepted_is_known_of_later() -> None:
    made = drafting(blocks=40)
    ready(made)
    made.complete(planned(made), said(25, 60, 61))
    while not made.idle:
        step(made, STOP)
    assert made.pool.match([*AGAIN, 23, 24, 25, 26, 27]).tokens(SIZE) == 18
    assert made.pool.match([*AGAIN, 23, 24, 25, 60, 27]).tokens(SIZE) == 19
    assert made.pool.held == 0


@pytest.mark.parametrize(
    ("sampled", "ids", "finish_reason"),
    [((25, STOP, 27), [25], "stop"), ((STOP, 26, 27), [], "stop"), ((25, 26, STOP), [25, 26], "stop")],
)
def test_a_reply_ends_within_a_draft(sampled: tuple[int, ...], ids: list[int], finish_reason: str) -> None:
    made = drafting()
    ready(made)
    (output,) = made.complete(planned(made), said(*sampled))
    assert (output.ids, output.finish) == (ids, finish_reason)
    assert output.timings is not None
    assert made.idle
    assert made.pool.held == 0


def test_no_more_is_drafted_than_may_be_said() -> None:
    made = drafting()
    ready(made, max_tokens=4)
    scheduled = planned(made)
    assert scheduled.plan.ids == [24, 25]
    (output,) = made.complete(scheduled, said(25, 26))
    assert (output.ids, output.finish) == ([25, 26], "length")
    made = drafting(context=18, blocks=5)
    ready(made)
    assert planned(made).plan.ids == [24], "the context is full then"


def test_drafts_stay_within_the_blocks_that_a_sequence_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cortex.neuron.engine.scheduler.AHEAD", 0)
    made = drafting(blocks=100)
    ready(made, ids=[*AGAIN, *AGAIN], max_tokens=60)
    for _ in range(8):
        scheduled = planned(made)
        (sequence,) = scheduled.sequences
        assert len(sequence.tokens) + len(sequence.draft) <= len(sequence.blocks) * SIZE
        made.complete(scheduled, said(*[*sequence.draft, 20 + len(sequence.tokens) % 12][: scheduled.rows]))


def test_a_draft_ends_where_a_stretch_does() -> None:
    pool, books = BlockPool(32, SIZE), StateBooks(1, 0, block=SIZE, stride=18)
    pace = Pace(64, 6, 1000)
    made = Scheduler(pool, context=100, pace=pace, vocab=100, clock=lambda: 0.0, states=books)
    ready(made)
    scheduled = planned(made)
    assert scheduled.plan.ids == [24, 25], "the positions 16 and 17"
    made.complete(scheduled, said(25, 26))
    assert planned(made).plan.ids == [26, 27, 28, 29, 30]


@pytest.mark.parametrize(
    "why",
    [
        {"repetition_penalty": 1.2},
        {"presence_penalty": 0.5},
    ],
)
def test_what_depends_on_each_token_before_it_is_not_drafted(why: dict[str, Any]) -> None:
    made = drafting()
    ready(made, **why)
    assert planned(made).plan.ids == [24]


def test_what_drafts_take_is_not_what_decode_takes() -> None:
    made = drafting()
    ready(made)
    scheduled = planned(made)
    pace = made._planner._pace
    known, price = dict(pace._decode), pace.draft_price(1)
    assert scheduled.rows == 3
    made.complete(scheduled, said(25, 26, 27))
    made.took(scheduled, 99.0)
    assert pace._decode == known
    assert pace.draft_price(1) > price
    pace.drafted(1, 4, known[1] / 1.1)
    assert pace._decode[1] == pace._alone[1] == known[1] / 1.1, "without a draft it would have taken less"
    pace.drafted(1, 4, known[1] / 1000)
    assert pace._decode[1] > known[1] / 1.5, "once is not always"


def together(made: Scheduler, count: int) -> Scheduled:
    """The first step of so many that decode and may have drafts: what they take without is known."""
    for key in range(1, count + 1):
        assert made.add(order(key, [*range(key, key + 12), key, key + 1, key + 2], 40)) is None
    while True:
        scheduled = planned(made)
        if scheduled.decoding == count and made._planner._pace.knows(count):
            return scheduled
        tokens = [sequence.key + (sequence.generated + 3) % 12 for sequence in scheduled.sampled]
        made.complete(scheduled, said(*tokens))
        made.took(scheduled, 0.010 + 0.001 * scheduled.work)


def test_several_that_decode_have_drafts_each_and_what_is_right_of_each_counts() -> None:
    made = drafting()
    scheduled = together(made, 3)
    assert [part.length for part in scheduled.plan.segments] == [3, 3, 3]
    rows = iter(scheduled.plan.ids)
    ids = [[next(rows) for _ in range(3)] for _ in range(3)]
    right = [[one[1], one[2], 77] for one in ids]
    right[1][1] = 78
    right[2][0] = 79
    outputs = made.complete(scheduled, said(*right[0], *right[1], *right[2]))
    assert [output.ids for output in outputs] == [right[0], right[1][:2], right[2][:1]]
    counts = made.take_counts()
    assert (counts.drafted, counts.accepted) == (6, 3)


def test_drafts_of_several_are_as_long_as_a_wrong_one_is_cheap() -> None:
    made = drafting()
    scheduled = together(made, 2)
    pace = made._planner._pace
    for seconds, most in ((0.010, MOST), (0.013, 3), (0.020, 1), (0.100, 1)):
        pace._decode[2], pace._drafted[2] = 0.010, 0.0
        for _ in range(60):
            pace.drafted(2, 2, seconds)
        for sequence in scheduled.sequences:
            sequence.draft, sequence.drafter._length, sequence.drafter._resumes = [], MOST, 0
        made._draft()
        assert {len(sequence.draft) for sequence in scheduled.sequences} == {most}


@pytest.mark.parametrize(("most", "drafted"), [(2, False), (3, True)])
def test_nothing_is_drafted_beside_prompts_nor_beside_more_than_may_draft(most: int, drafted: bool) -> None:
    """A third one joins two that have drafts. All say what they have said before."""
    made = drafting(most=most)
    scheduled = together(made, 2)
    assert scheduled.rows == 6
    made.complete(scheduled, said(*[50] * scheduled.rows))
    assert made.add(order(3, [*range(60, 75), 60, 61, 62], 20)) is None
    beside = 0
    for _ in range(15):
        for sequence in made._running:
            sequence.drafter._resumes = 0
        scheduled = planned(made)
        some_prompt = any(not sequence.in_decode for sequence in scheduled.sequences)
        beside += scheduled.rows > len(scheduled.sampled)
        assert not (some_prompt and scheduled.rows > len(scheduled.sampled))
        tokens = [60 + (len(sequence.tokens) - 15) % 15 for sequence in scheduled.sampled]
        firsts = zip(scheduled.sampled, tokens, strict=True)
        rows = [row for sequence, token in firsts for row in [token, *[50] * len(sequence.draft)]]
        made.complete(scheduled, said(*rows))
        made.took(scheduled, 0.01)
    assert bool(beside) is drafted


def test_drafts_that_are_right_and_cost_more_than_they_bring_rest_too() -> None:
    pace, drafter, tokens = Pace(64, 6, 1000), Drafter(), [*LINE, *LINE[:3]]
    pace._decode[8] = pace._alone[8] = 0.010
    drafts = 0
    for _ in range(40):
        tokens += [*LINE, *LINE[:3]]
        draft = drafter.propose(tokens, pace.longest_draft(8))
        if draft:
            drafts += 1
            drafter.judge(len(draft), len(draft), pace.draft_price(8), len(tokens))
            pace.drafted(8, len(draft), 0.030)
    assert pace.draft_price(8) > 1
    assert pace.longest_draft(8) == 1
    assert drafts < 25


def test_too_few_or_too_many_tokens_for_the_rows_are_an_error() -> None:
    made = drafting()
    ready(made)
    with pytest.raises(ValueError, match="2 tokens came for 3 rows"):
        made.complete(planned(made), said(25, 26))


def test_each_token_has_its_own_number_however_many_were_drafted() -> None:
    """Numbers for tokens that were not accepted are those of the next ones."""

    def drawn(accept: int) -> list[int]:
        sequence = Sequence(order(1, AGAIN, temperature=1.0, seed=7), 0.0)
        found: list[float] = []
        while len(found) < 8:
            ahead = [sequence.draw(at) for at in range(4)]
            for number in ahead[:accept]:
                sequence.append(50, 0.0)
                found.append(number)
        return found[:8]

    assert drawn(1) == drawn(2) == drawn(4)
    assert len(set(drawn(1))) == 8
