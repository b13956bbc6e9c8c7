"""The line of those who wait: order, who is held back, and whose wait is too long."""

from __future__ import annotations

import pytest

from cortex.hookspecs import Sampling
from cortex.neuron.engine.blocks import Block
from cortex.neuron.engine.line import Awaited, Line
from cortex.neuron.engine.messages import Generate
from cortex.neuron.engine.sequence import Sequence


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def line(clock: Clock) -> Line:
    return Line(clock, 5.0)


def sequence(key: int, request: str = "") -> Sequence:
    order = Generate(key=key, request_id=request or f"r{key}", ids=[1, 2], sampling=Sampling(max_tokens=1))
    return Sequence(order, 0.0)


def running() -> Sequence:
    one = sequence(99)
    one.blocks = [Block(0)]
    return one


def keys(sequences: list[Sequence]) -> list[int]:
    return [each.key for each in sequences]


def test_who_came_first_is_next_and_who_has_run_is_before_all(line: Line) -> None:
    for key in (1, 2):
        line.add(sequence(key))
    line.put_first(sequence(3))
    found = []
    while (one := line.next()) is not None:
        found.append(one.key)
        line.starts(one)
    assert found == [3, 1, 2]


def test_others_pass_whoever_is_held_back_until_what_it_awaits_is_there(line: Line) -> None:
    held, other, by = sequence(1), sequence(2), running()
    line.add(held)
    line.add(other)
    line.hold(held, Awaited(by, 16))
    assert line.next() is other
    by.cached = 16
    assert line.next() is held


def test_what_is_awaited_of_one_that_runs_no_more_does_not_come(line: Line) -> None:
    held, by = sequence(1), running()
    line.add(held)
    line.hold(held, Awaited(by, 16))
    assert line.next() is None
    by.blocks = []
    assert line.next() is held


def test_whoever_waited_too_long_leaves(line: Line, clock: Clock) -> None:
    line.add(sequence(1))
    clock.now = 1.0
    line.add(sequence(2))
    clock.now = 5.0
    assert line.take_late() == []
    clock.now = 5.5
    assert keys(line.take_late()) == [1]
    assert keys(list(line)) == [2]


def test_who_was_held_back_waits_from_then_on(line: Line, clock: Clock) -> None:
    held, by = sequence(1), running()
    line.add(held)
    line.hold(held, Awaited(by, 16))
    clock.now = 100.0
    assert line.take_late() == []
    by.blocks = []
    assert line.take_late() == []
    clock.now = 105.0
    assert line.take_late() == []
    clock.now = 105.5
    assert line.take_late() == [held]


def test_choices_of_a_reply_that_has_begun_wait_as_long_as_it_takes(line: Line, clock: Clock) -> None:
    first, second, other = sequence(1, "both"), sequence(2, "both"), sequence(3)
    for one in (first, second, other):
        line.add(one)
    line.starts(first)
    clock.now = 100.0
    assert line.take_late() == [other]
    assert line.next() is second


def test_whoever_has_run_is_never_too_late(line: Line, clock: Clock) -> None:
    line.put_first(sequence(1))
    clock.now = 100.0
    assert line.take_late() == []


def test_without_a_limit_nobody_is(clock: Clock) -> None:
    line = Line(clock, None)
    line.add(sequence(1))
    clock.now = 1e9
    assert line.take_late() == []


def test_who_is_dropped_leaves_and_a_key_that_is_unknown_is_nobodys(line: Line) -> None:
    for key in (1, 2, 3):
        line.add(sequence(key))
    line.drop(2)
    line.drop(2)
    assert keys(line) == [1, 3]
    for key in (1, 3):
        line.drop(key)
    assert not line
    assert line.next() is None
