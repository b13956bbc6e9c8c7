"""Prompts beside those who decode: short ones go along, a long one passes the layers some at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from cortex.hookspecs import Sampling
from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.messages import Generate, Output
from cortex.neuron.engine.pace import FIRST, Pace
from cortex.neuron.engine.planning import Scheduled
from cortex.neuron.engine.scheduler import Scheduler

LAYERS, STOP = 10, 9
DECODE, TOKEN = 0.010, 0.001
"""Seconds of a pass in which some decode, and more for each token of a prompt, in all layers."""


def scheduler(running: int = 8, **changes: Any) -> Scheduler:
    settings = {"context": 2000, "vocab": 100, "clock": lambda: 0.0, "max_running": running, **changes}
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


def finish(made: Scheduler, scheduled: Scheduled, token: int = 50) -> list[Output]:
    """The step is computed, in the time that it takes."""
    outputs = made.complete(scheduled, [(token, None)] * len(scheduled.sampled))
    layers = scheduled.plan.layers
    work = TOKEN * scheduled.work
    made.took(scheduled, work * layers / LAYERS if layers else DECODE + work)
    return outputs


def step(made: Scheduler, token: int = 50) -> Scheduled:
    scheduled = plan(made)
    finish(made, scheduled, token)
    return scheduled


def keys(scheduled: Scheduled) -> list[int]:
    return [sequence.key for sequence in scheduled.sequences]


def until(made: Scheduler, done: Callable[[Scheduled], object], steps: int = 100) -> Scheduled:
    """The first step of which `done` is true, which is computed too."""
    for _ in range(steps):
        scheduled = step(made)
        if done(scheduled):
            return scheduled
    raise AssertionError(f"not within {steps} steps")


@pytest.fixture
def made() -> Scheduler:
    """One who decodes, and what that takes and prompts do is known."""
    made = scheduler()
    ask(made, 1, 64)
    for _ in range(3):
        step(made)
    return made


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
    layers: list[int] = []
    while sum(layers) < LAYERS:
        scheduled = plan(made)
        chunk = scheduled.plan.chunk
        assert (chunk is None) == bool(layers)
        if chunk is not None:
            assert (chunk.ids, chunk.segments[0].length, chunk.wanted) == (made._running[1].tokens, 50, [49])
        assert keys(scheduled) == [2]
        assert (scheduled.plan.ids, scheduled.decoding) == ([], 0)
        layers.append(scheduled.plan.layers)
        assert layers[-1] >= 1
        if sum(layers) < LAYERS:
            assert (scheduled.sampled, scheduled.prefill) == ([], 0)
            assert finish(made, scheduled) == []
            assert made._running[1].cached == 0
            between = step(made)
            assert (keys(between), between.plan.layers, between.decoding) == ([1], 0, 1)
    assert len(layers) > 3
    assert ([sequence.key for sequence in scheduled.sampled], scheduled.prefill) == ([2], 50)
    assert [output.key for output in finish(made, scheduled)] == [2]
    assert made._running[1].cached == 50
    assert step(made).decoding == 2


def test_a_longer_one_takes_chunk_after_chunk(made: Scheduler) -> None:
    ask(made, 2, 1500)
    computed: list[int] = []
    steps = []
    while sum(computed) < 1500:
        scheduled = step(made)
        steps.append(scheduled.decoding)
        if scheduled.prefill:
            computed.append(scheduled.prefill)
    assert set(steps[::2]) == {1}, "whoever decodes has every other step"
    assert set(steps[1::2]) == {0}
    assert len(computed) > 5
    assert max(computed) - min(computed) < 64
    assert made._running[1].generated == 1


def test_after_a_slow_pass_of_those_who_decode_fewer_layers_are_passed(made: Scheduler) -> None:
    ask(made, 2, 40)
    passed = []
    for seconds in (DECODE, 1.5 * DECODE):
        scheduled = plan(made)
        made.complete(scheduled, [(50, None)])
        made.took(scheduled, seconds)
        passed.append(step(made).plan.layers)
    assert passed[0] > passed[1] >= 1


def test_what_decode_takes_is_found_out_before_a_prompt_goes_along() -> None:
    made = scheduler()
    ask(made, 1, 64)
    step(made)
    ask(made, 2, 5)
    assert keys(step(made)) == [1]
    assert keys(step(made)) == [1, 2]


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


def test_short_prompts_pass_a_long_one_that_goes_on_all_the_same(made: Scheduler) -> None:
    ask(made, 2, 40)
    step(made)
    first = step(made)
    assert first.plan.chunk is not None
    ask(made, 3, 4)
    assert keys(step(made)) == [1, 3]
    shared = step(made)
    assert keys(shared) == [2]
    assert 1 <= shared.plan.layers < first.plan.layers, "they share the time"
    ask(made, 4, 200)
    for _ in range(4):
        assert 4 not in keys(step(made)), "it is not short, and waits"


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
        step(made)
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
