"""Prompts beside those who decode: short ones go along, a long one passes the layers some at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cortex.hookspecs import Sampling
from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.messages import Generate, Output
from cortex.neuron.engine.pace import FIRST, Pace
from cortex.neuron.engine.planning import YOUNG, Scheduled
from cortex.neuron.engine.scheduler import Scheduler

LAYERS, STOP = 10, 9
DECODE, TOKEN = 0.010, 0.001
"""Seconds of a pass in which some decode, and more for each token of a prompt, in all layers."""


def scheduler(running: int = 8, **changes: Any) -> Scheduler:
    settings = {"context": 2000, "vocab": 100, "clock": lambda: 0.0, "max_running": running, **changes}
    settings.setdefault("drafting", 0)
    pace = Pace(settings.pop("prefill_chunk", 512), LAYERS, 1e9)
    return Scheduler(BlockPool(1000, 16), pace=pace, **settings)


def ask(made: Scheduler, key: int, length: int, max_tokens: int = 500) -> None:
    settings = Sampling(max_tokens=max_tokens, stop_ids=(STOP,))
    ids = [(10 + 7 * key + index) % 100 for index in range(length)]
    assert made.add(Generate(key=key, request_id="r", ids=ids, sampling=settings)) is None


def plan(made: Scheduler) -> Scheduled:
    scheduled = made.schedule()
    assert scheduled is not None
    return scheduled


def seconds(scheduled: Scheduled) -> float:
    """What the step takes. In the last layer, one row of a chunk is next to nothing."""
    layers, work = scheduled.plan.layers, TOKEN * scheduled.work
    return work * (layers - bool(scheduled.prefill)) / LAYERS if layers else DECODE + work


def finish(made: Scheduler, scheduled: Scheduled, slow: float = 1.0) -> list[Output]:
    """The step is computed, in so many times the time that it takes."""
    outputs = made.complete(scheduled, [(50, None)] * len(scheduled.sampled))
    made.took(scheduled, slow * seconds(scheduled))
    return outputs


def step(made: Scheduler) -> Scheduled:
    scheduled = plan(made)
    finish(made, scheduled)
    return scheduled


def turn(made: Scheduler, slow: float = 1.0) -> tuple[list[Scheduled], Scheduled]:
    """The steps of a chunk's turn, each of them so slow, and the others' step that is planned after it."""
    steps = []
    while (scheduled := plan(made)).plan.layers:
        finish(made, scheduled, slow)
        steps.append(scheduled)
    return steps, scheduled


def layers(steps: list[Scheduled]) -> int:
    return sum(scheduled.plan.layers for scheduled in steps)


def keys(scheduled: Scheduled) -> list[int]:
    return [sequence.key for sequence in scheduled.sequences]


def until(made: Scheduler, done: Callable[[Scheduled], object], steps: int = 100) -> Scheduled:
    """The first step of which `done` is true, which is computed too."""
    for _ in range(steps):
        scheduled = step(made)
        if done(scheduled):
            return scheduled
    raise AssertionError(f"not within {steps} steps")


def one_decoding() -> Scheduler:
    """One who decodes, and what that takes and prompts do is known."""
    made = scheduler()
    ask(made, 1, 64)
    grow_up(made, step)
    return made


def grow_up(made: Scheduler, step: Callable[[Scheduler], object]) -> None:
    """Until those who run have begun so long ago that prompts are shared out beside them."""
    step(made)
    while any(sequence.generated <= YOUNG for sequence in made._running):
        step(made)


@pytest.fixture
def made() -> Scheduler:
    return one_decoding()


def test_a_short_prompt_goes_along_with_those_who_decode(made: Scheduler) -> None:
    ask(made, 2, 5)
    scheduled = plan(made)
    assert keys(scheduled) == [1, 2]
    assert [part.length for part in scheduled.plan.segments] == [1, 5]
    assert (scheduled.plan.chunk, scheduled.plan.layers) == (None, 0)
    assert (scheduled.decoding, scheduled.prefill) == (1, 5)
    assert scheduled.plan.wanted == [0, 5]
    assert [output.key for output in finish(made, scheduled)] == [1, 2]


def test_a_long_one_passes_some_layers_at_a_time_and_is_sampled_after_the_last(made: Scheduler) -> None:
    """Between them the others decode."""
    ask(made, 2, 50)
    assert keys(step(made)) == [1], "in which it is seen that it is long"
    passed = turns = 0
    while passed < LAYERS:
        scheduled = plan(made)
        if not scheduled.plan.layers:
            assert (keys(scheduled), scheduled.decoding) == ([1], 1)
            finish(made, scheduled)
            turns += 1
            continue
        chunk = scheduled.plan.chunk
        assert (chunk is None) == bool(passed)
        if chunk is not None:
            assert (chunk.ids, chunk.segments[0].length, chunk.wanted) == (made._running[1].tokens, 50, [49])
        assert keys(scheduled) == [2]
        assert (scheduled.plan.ids, scheduled.decoding) == ([], 0)
        passed += scheduled.plan.layers
        if passed < LAYERS:
            assert (scheduled.sampled, scheduled.prefill) == ([], 0)
            assert finish(made, scheduled) == []
            assert made._running[1].cached == 0
    assert turns >= 3
    assert ([sequence.key for sequence in scheduled.sampled], scheduled.prefill) == ([2], 50)
    assert [output.key for output in finish(made, scheduled)] == [2]
    assert made._running[1].cached == 50
    assert step(made).decoding == 2


def test_a_longer_one_takes_chunk_after_chunk(made: Scheduler) -> None:
    ask(made, 2, 1500)
    step(made)
    computed: list[int] = []
    while made._running[1].missing > 1:
        steps, others = turn(made)
        assert sum(map(seconds, steps)) <= 1.5 * DECODE, "whoever decodes does not wait for longer"
        assert others.decoding >= 1
        finish(made, others)
        computed += [scheduled.prefill for scheduled in steps if scheduled.prefill]
    assert sum(computed) == 1500
    assert len(computed) > 5
    assert max(computed) - min(computed) < 64
    assert made._running[1].generated >= 1


def test_after_a_slow_pass_of_those_who_decode_fewer_layers_are_passed(made: Scheduler) -> None:
    ask(made, 2, 40)
    passed = []
    for slow in (1.0, 1.5):
        finish(made, plan(made), slow)
        passed.append(layers(turn(made)[0]))
    assert passed[0] > passed[1] >= 1


def test_the_last_layer_goes_along_with_the_one_before_it_and_teaches_nothing(made: Scheduler) -> None:
    """It costs next to nothing: a turn for it would be lost, and the next chunk would be too large."""
    ask(made, 2, 400)
    step(made)
    pace = made._planner._pace
    last: list[int] = []
    while made._running[1].missing > 1:
        steps, others = turn(made)
        finish(made, others)
        last += [scheduled.plan.layers for scheduled in steps if scheduled.prefill]
        assert pace.passes(1.0, 1.0) <= 1.01 * LAYERS / TOKEN
    assert len(last) >= 3
    assert min(last) >= 2


@pytest.mark.parametrize(("slow", "goes_on"), [(0.05, True), (1.5, False)])
def test_what_is_left_of_a_turn_after_a_chunk_is_for_the_next_one(
    made: Scheduler, slow: float, goes_on: bool
) -> None:
    ask(made, 2, 1500)
    while not (last := plan(made)).prefill:
        finish(made, last)
    finish(made, last, slow)
    after = plan(made)
    assert (after.plan.chunk is not None) is goes_on
    assert after.decoding == (0 if goes_on else 1)
    if goes_on:
        assert after.plan.layers < LAYERS / 2, "for as long as those who decode may wait"


@pytest.mark.parametrize(("first", "within"), [(128, 0.5), (600, 1.5)])
def test_a_prompt_that_came_before_a_long_one_is_ready_before_it(
    made: Scheduler, first: int, within: float
) -> None:
    """Its rest is too dear to go along, and is shorter than the long one's: it sets out first even so."""
    ask(made, 2, first)
    ask(made, 3, 1500)
    taken = seconds(step(made))
    while not made._running[1].generated:
        taken += seconds(scheduled := plan(made))
        finish(made, scheduled)
    assert taken <= within
    assert made._running[2].missing > 1000


@pytest.mark.parametrize("length", [7, 100])
def test_long_prompts_one_after_the_other_keep_no_short_one_waiting(made: Scheduler, length: int) -> None:
    """Neither one that would go along if no chunk were on its way, nor one that is too dear for that."""
    key = 3
    ask(made, 2, 400, 1)
    ask(made, 3, 400, 1)
    ask(made, 100, length, 1)
    for _ in range(2000):
        if len(made._running) < 4 and 100 in (sequence.key for sequence in made._running):
            key += 1
            ask(made, key, 400, 1)
        if any(output.key == 100 for output in finish(made, plan(made))):
            break
    else:
        raise AssertionError(f"{key - 1} long ones went before it")
    assert key <= 6


def test_what_goes_along_with_those_who_decode_waits_for_their_turn(made: Scheduler) -> None:
    ask(made, 2, 300)
    while not (last := plan(made)).prefill or made._running[1].missing - last.prefill > 0:
        finish(made, last)
    ask(made, 3, 5)
    finish(made, last, 0.05)
    assert made._running[1].in_decode
    assert keys(plan(made))[:2] == [1, 2]


def test_what_a_chunk_has_taken_says_how_many_layers_more_it_may_pass() -> None:
    """One that somebody else disturbs stops before those who decode have waited for twice as long."""
    passed = {}
    for slow in (0.5, 1.0, 1.7):
        made = one_decoding()
        ask(made, 2, 30)
        step(made)
        steps, _ = turn(made, slow)
        assert slow * sum(map(seconds, steps)) <= 1.4 * DECODE
        passed[slow] = layers(steps)
    assert passed[0.5] > passed[1.0] > passed[1.7] >= 1


def test_what_decode_takes_is_found_out_before_a_prompt_goes_along() -> None:
    made = scheduler()
    for key, most in ((1, 500), (2, 500), (3, YOUNG + 1)):
        ask(made, key, 64, max_tokens=most)
    grow_up(made, step)
    ask(made, 4, 5)
    assert keys(step(made)) == [1, 2], "two of them have not decoded without a third one"
    assert keys(step(made)) == [1, 2, 4]


def test_short_prompts_catch_up_with_replies_that_have_just_begun() -> None:
    """The second step takes what the first one had no room for."""
    made = scheduler(running=20)
    for key in range(9):
        ask(made, key, 100)
    first = step(made)
    assert (keys(first), first.prefill) == ([0, 1, 2, 3, 4, 5], 512)
    second = step(made)
    assert keys(second) == [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert (second.decoding, second.prefill) == (5, 388)
    assert [sequence.key for sequence in second.sampled] == [*range(9)]


def test_short_replies_that_begin_and_end_all_the_time_do_not_pass_a_long_prompt_over() -> None:
    made = scheduler(running=20)
    for key in range(1, 200):
        ask(made, key, 60, max_tokens=2)
        if key == 20:
            ask(made, 0, 1500)
        if 0 in [sequence.key for sequence in step(made).sampled]:
            break
    assert 20 < key < 120


def test_once_a_reply_is_under_way_no_prompt_holds_it_up() -> None:
    made = scheduler(running=20)
    ask(made, 0, 100)
    step(made)
    for key in range(1, 10):
        ask(made, key, 100)
        assert step(made).prefill == (100 if key <= YOUNG else 0)


def test_a_chunk_of_unknown_cost_passes_one_layer() -> None:
    made = scheduler()
    ask(made, 1, 1)
    made.complete(plan(made), [(50, None)])  # nobody says how long it took
    assert keys(step(made)) == [1]
    ask(made, 2, 1000)
    step(made)
    scheduled = plan(made)
    assert scheduled.plan.layers == 1
    assert scheduled.plan.chunk is not None
    assert scheduled.plan.chunk.segments[0].length <= FIRST


def test_where_the_clock_stands_still_a_chunk_passes_a_layer_in_each_turn() -> None:
    made = scheduler()
    ask(made, 1, 1)
    grow_up(made, lambda made: finish(made, plan(made), 0.0))
    ask(made, 2, 50)
    finish(made, plan(made), 0.0)
    passed = 0
    while passed < LAYERS:
        steps, others = turn(made, 0.0)
        assert layers(steps) == (1 if passed < LAYERS - 2 else 2), "the last one goes along"
        assert keys(others)[0] == 1
        finish(made, others, 0.0)
        passed += layers(steps)
    assert made._running[1].generated >= 1


def test_short_prompts_pass_a_long_one_that_goes_on_all_the_same(made: Scheduler) -> None:
    ask(made, 2, 30)
    step(made)
    first, others = turn(made)
    finish(made, others)
    ask(made, 3, 4)
    _, others = turn(made)
    assert keys(others) == [1, 3]
    finish(made, others)
    shared, others = turn(made)
    assert {key for scheduled in shared for key in keys(scheduled)} == {2}
    assert 1 <= layers(shared) < layers(first), "they share the time"
    finish(made, others)
    ask(made, 4, 200)

    def is_through(scheduled: Scheduled) -> bool:
        assert 4 not in keys(scheduled), "it is not short, and waits"
        return keys(scheduled) == [2] and scheduled.prefill == 30

    until(made, is_through)


def test_a_short_prompt_that_does_not_go_along_waits_for_one_chunk_of_a_long_one_and_not_for_all(
    made: Scheduler,
) -> None:
    """And the long one goes on between many short ones."""
    ask(made, 2, 1500)
    until(made, lambda scheduled: scheduled.plan.chunk)
    for key in (3, 4):
        ask(made, key, 100)
    through: list[int] = []

    def note(scheduled: Scheduled) -> bool:
        if scheduled.plan.layers and scheduled.prefill:
            through.append(keys(scheduled)[0])
        return through.count(2) > 6

    until(made, note, 2000)
    third, fourth = through.index(3), through.index(4)
    assert third <= 2, "the chunk that is on its way, and no other"
    assert 2 in through[third:fourth], "the long one has every second chunk"
    assert fourth < len(through) - 2


@pytest.mark.parametrize("cost", [0.0, 1e-9])
def test_prompts_that_cost_nothing_fill_no_more_than_a_step(made: Scheduler, cost: float) -> None:
    for _ in range(40):
        made._planner._pace.made(1, 100.0, DECODE + 100 * cost)
    for key in (2, 3, 4):
        ask(made, key, 300)
    scheduled = plan(made)
    assert 300 <= scheduled.prefill <= 512


def test_once_nobody_decodes_the_chunk_passes_what_is_left_of_the_layers(made: Scheduler) -> None:
    ask(made, 2, 1500)
    step(made)
    scheduled = step(made)
    ask(made, 3, 600)
    made.cancel(1)
    others = step(made)
    assert (keys(others), others.prefill) == ([3], 512), "others get a whole step first"
    rest = step(made)
    assert (keys(rest), rest.plan.layers) == ([2], LAYERS - scheduled.plan.layers)
    assert made._running[0].cached > 0
    assert step(made).plan.layers == 0


def test_alone_a_chunk_does_not_wait_for_anybody(made: Scheduler) -> None:
    ask(made, 2, 1500)
    step(made)
    scheduled = step(made)
    made.cancel(1)
    assert step(made).plan.layers == LAYERS - scheduled.plan.layers


def test_when_nobody_decodes_short_prompts_go_first_and_the_rest_share_the_step_in_order() -> None:
    made = scheduler(prefill_chunk=64)
    ask(made, 1, 100)
    ask(made, 2, 50)
    ask(made, 3, 10)
    scheduled = step(made)
    assert keys(scheduled) == [3, 1]
    assert [part.length for part in scheduled.plan.segments] == [10, 54]
    assert scheduled.plan.wanted == [9]


@pytest.mark.parametrize("ends", ["cancelled", "broken"])
def test_a_chunk_whose_sequence_is_gone_goes_no_further(made: Scheduler, ends: str) -> None:
    ask(made, 2, 1500)
    step(made)
    step(made)
    if ends == "cancelled":
        made.cancel(2)
        assert keys(step(made)) == [1]
    else:
        finish(made, turn(made)[1])
        broken = plan(made)
        assert [output.key for output in made.fail(broken, "why")] == [2], "the other one is computed anew"
    for _ in range(4):
        scheduled = step(made)
        assert (keys(scheduled), scheduled.plan.layers) == ([1], 0)
    ask(made, 3, 1500)
    opened = until(made, lambda each: each.plan.layers)
    assert opened.plan.chunk is not None
    assert opened.plan.chunk.segments[0].start == 0


def test_a_beginning_that_comes_through_is_known_to_others(made: Scheduler) -> None:
    ask(made, 2, 300)
    until(made, lambda scheduled: scheduled.prefill)
    known = made._running[1].cached
    made.cancel(2)
    ask(made, 2, 300)
    scheduled = until(made, lambda each: each.plan.layers)
    assert scheduled.plan.chunk is not None
    assert 0 < known == scheduled.plan.chunk.segments[0].start


def test_after_one_slow_pass_with_a_prompt_others_go_along_again(made: Scheduler) -> None:
    shared = 0
    for key in range(2, 12):
        ask(made, key, 8, max_tokens=2)
        slow = until(made, lambda scheduled: scheduled.prefill)
        made.took(slow, 50 * seconds(slow))
    for key in range(12, 100):
        ask(made, key, 8, max_tokens=2)
        first = until(made, lambda scheduled: scheduled.prefill)
        shared += first.decoding > 0
        while made.running > 1 or made.waiting:
            step(made)
    assert shared > 40
