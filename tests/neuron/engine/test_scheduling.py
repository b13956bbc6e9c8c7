from __future__ import annotations

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cortex.hookspecs import EngineTimings, Sampling
from cortex.neuron.engine.messages import Generate, Output
from cortex.neuron.engine.scheduler import Scheduled, Scheduler
from cortex.neuron.nn.plan import Segment

STOP = 9


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def scheduler(clock: Clock | None = None, **changes: Any) -> Scheduler:
    settings = {"slots": 1, "context": 32, "prefill_chunk": 4, "vocab": 100, **changes}
    return Scheduler(**settings, clock=clock or Clock())


def order(key: int, length: int = 3, max_tokens: int = 4, **sampling: Any) -> Generate:
    settings = Sampling(max_tokens=max_tokens, stop_ids=(STOP,), **sampling)
    return Generate(key=key, request_id=f"r{key}", ids=list(range(10, 10 + length)), sampling=settings)


def planned(made: Scheduler) -> Scheduled:
    scheduled = made.schedule()
    assert scheduled is not None
    return scheduled


def test_a_prompt_is_computed_in_chunks_and_only_its_last_row_is_sampled() -> None:
    made = scheduler()
    assert made.add(order(1, length=10)) is None
    for start, length, wanted in [(0, 4, []), (4, 4, []), (8, 2, [1])]:
        scheduled = planned(made)
        assert scheduled.plan.ids == list(range(10 + start, 10 + start + length))
        assert scheduled.plan.segments == [Segment(0, start, length)]
        assert scheduled.plan.positions == list(range(start, start + length))
        assert scheduled.plan.wanted == wanted
        outputs = made.complete(scheduled, [50] * len(wanted))
    assert outputs == [Output(key=1, ids=[50])]
    decode = planned(made)
    assert (decode.plan.ids, decode.plan.segments, decode.plan.wanted) == ([50], [Segment(0, 10, 1)], [0])


def test_a_stop_id_ends_the_sequence_and_is_not_given_out() -> None:
    made = scheduler()
    made.add(order(1))
    made.complete(planned(made), [50])
    (output,) = made.complete(planned(made), [STOP])
    assert (output.ids, output.finish) == ([], "stop")
    assert made.idle
    assert made.schedule() is None


def test_max_tokens_end_the_sequence_with_its_last_token() -> None:
    made = scheduler()
    made.add(order(1, max_tokens=2))
    made.complete(planned(made), [50])
    (output,) = made.complete(planned(made), [51])
    assert (output.ids, output.finish) == ([51], "length")
    assert made.idle


def test_a_full_context_ends_the_sequence() -> None:
    made = scheduler(context=5)
    made.add(order(1, length=3, max_tokens=100))
    assert made.complete(planned(made), [50])[0].finish is None
    (output,) = made.complete(planned(made), [51])
    assert (output.ids, output.finish) == ([51], "length")


def test_times_are_split_into_queue_prefill_and_decode() -> None:
    clock = Clock()
    made = scheduler(clock)
    made.add(order(1, length=6, max_tokens=2))
    clock.now = 1.0
    scheduled = planned(made)
    clock.now = 1.5
    made.complete(scheduled, [])
    scheduled = planned(made)
    clock.now = 3.0
    assert made.complete(scheduled, [50])[0].timings is None
    scheduled = planned(made)
    clock.now = 3.25
    (output,) = made.complete(scheduled, [51])
    assert output.timings == EngineTimings(queue_ms=1000.0, prefill_ms=2000.0, decode_ms=250.0)


def test_a_waiting_sequence_gets_the_slot_that_is_left() -> None:
    made = scheduler()
    made.add(order(1, max_tokens=1))
    made.add(order(2))
    first = planned(made)
    assert [sequence.key for sequence in first.sequences] == [1]
    made.complete(first, [50])
    assert [sequence.key for sequence in planned(made).sequences] == [2]


@pytest.mark.parametrize("steps", [0, 1, 3], ids=["waiting", "prefill", "decode"])
def test_a_cancelled_sequence_is_in_no_later_step(steps: int) -> None:
    made = scheduler()
    made.add(order(1, length=6, max_tokens=20))
    for _ in range(steps):
        scheduled = planned(made)
        made.complete(scheduled, [50] * len(scheduled.sampled))
    made.cancel(1)
    assert made.idle
    assert made.schedule() is None
    made.cancel(1)  # a second time, as when it had finished
    made.add(order(2))
    assert planned(made).plan.segments == [Segment(0, 0, 3)]


def test_decode_comes_before_prefill_and_prompts_share_the_chunk() -> None:
    made = scheduler(slots=3)
    made.add(order(1, length=2, max_tokens=20))
    made.complete(planned(made), [50])
    made.add(order(2, length=3))
    made.add(order(3, length=6))
    scheduled = planned(made)
    assert [sequence.key for sequence in scheduled.sequences] == [1, 2, 3]
    assert [part.length for part in scheduled.plan.segments] == [1, 3, 1]
    assert scheduled.plan.wanted == [0, 3]
    assert [output.key for output in made.complete(scheduled, [51, 52])] == [1, 2]


def test_values_that_are_not_numbers_fail_their_sequence_only() -> None:
    made = scheduler(slots=2)
    made.add(order(1))
    made.add(order(2, length=1))
    outputs = made.complete(planned(made), [None, 50])
    assert outputs[0].error is not None
    assert "not numbers" in outputs[0].error
    assert outputs[1] == Output(key=2, ids=[50])
    assert [sequence.key for sequence in planned(made).sequences] == [2]


def test_a_broken_step_fails_the_sequences_in_it_only() -> None:
    made = scheduler()
    made.add(order(1))
    made.add(order(2))
    assert made.fail(planned(made), "why") == [Output(key=1, ids=[], error="why")]
    assert [sequence.key for sequence in planned(made).sequences] == [2]


def test_a_lost_device_fails_everything() -> None:
    made = scheduler()
    made.add(order(1))
    made.add(order(2))
    planned(made)
    assert [output.key for output in made.fail_all("why")] == [1, 2]
    assert made.idle


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (order(1, length=0), "The prompt is empty"),
        (order(1, length=32), "The prompt has 32 tokens; the context of 32"),
        (order(1, max_tokens=0), "max_tokens is 0"),
        (Generate(key=1, request_id="r", ids=[3, 100], sampling=Sampling(max_tokens=1)), "100 tokens"),
        (Generate(key=1, request_id="r", ids=[-1], sampling=Sampling(max_tokens=1)), "100 tokens"),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_reason(bad: Generate, said: str) -> None:
    made = scheduler()
    refused = made.add(bad)
    assert refused is not None
    assert refused.error is not None
    assert said in refused.error
    assert made.idle


class AnyTraffic(RuleBasedStateMachine):
    """Whatever comes and goes: slots are never shared, chunks are bounded, every sequence ends once."""

    def __init__(self) -> None:
        super().__init__()
        self.made = scheduler(slots=2, context=12)
        self.keys = 0
        self.open: set[int] = set()
        self.known: dict[int, int] = {}

    @rule(length=st.integers(0, 13), max_tokens=st.integers(0, 6))
    def add(self, length: int, max_tokens: int) -> None:
        self.keys += 1
        if self.made.add(order(self.keys, length, max_tokens)) is None:
            self.open.add(self.keys)
            self.known[self.keys] = length

    @rule(key=st.integers(1, 20))
    def cancel(self, key: int) -> None:
        self.made.cancel(key)
        self.open.discard(key)

    @rule(token=st.sampled_from([50, 50, 50, STOP, None]))
    def step(self, token: int | None) -> None:
        scheduled = self.made.schedule()
        if scheduled is None:
            assert not self.open
            return
        segments = scheduled.plan.segments
        assert len({part.slot for part in segments}) == len(segments) <= 2
        assert sum(part.length for part in segments) == len(scheduled.plan.ids)
        prefilled = [
            part.length
            for part, sequence in zip(segments, scheduled.sequences, strict=True)
            if not sequence.in_decode
        ]
        assert sum(prefilled) <= 4
        assert all(part.end <= 12 for part in segments)
        for output in self.made.complete(scheduled, [token] * len(scheduled.sampled)):
            assert output.key in self.open
            if output.finish or output.error:
                self.open.discard(output.key)

    @invariant()
    def idle_means_that_nothing_is_open(self) -> None:
        assert self.made.idle == (not self.open)


TestAnyTraffic = AnyTraffic.TestCase
