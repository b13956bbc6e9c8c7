from __future__ import annotations

import pytest

from cortex.neuron.admission import Admission
from cortex.wire.errors import BadRequest, Busy, OverLimit


def test_some_run_and_the_rest_wait() -> None:
    line = Admission(max_running=1, max_waiting=2)
    line.enter("m")
    line.enter("m")
    assert (line.present, line.running, line.waiting) == (2, 1, 1)
    line.leave()
    assert (line.present, line.running, line.waiting) == (1, 1, 0)
    line.leave()
    assert (line.present, line.running, line.waiting) == (0, 0, 0)


def test_a_full_line_is_refused_with_the_numbers() -> None:
    line = Admission(max_running=1, max_waiting=2)
    for _ in range(3):
        line.enter("m")
    with pytest.raises(Busy, match="1 running and 2 waiting") as refusal:
        line.enter("m")
    assert refusal.value.retry_after == 6
    assert refusal.value.details == {"running": 1, "waiting": 2, "max_running": 1, "max_waiting": 2}
    line.leave()
    line.enter("m")


def test_a_request_takes_a_place_for_each_of_its_sequences() -> None:
    line = Admission(max_running=2, max_waiting=2)
    line.enter("m", "ann", 3)
    assert (line.running, line.waiting) == (2, 1)
    with pytest.raises(Busy):
        line.enter("m", "ben", 2)
    line.enter("m", "ben", 1)
    line.leave("ann", 3)
    assert (line.running, line.waiting) == (1, 0)


@pytest.mark.parametrize(("max_per_caller", "most"), [(0, 4), (3, 3), (9, 4)])
def test_what_could_never_be_admitted_is_not_told_to_wait(max_per_caller: int, most: int) -> None:
    line = Admission(max_running=2, max_waiting=2, max_per_caller=max_per_caller)
    line.enter("m", places=1)
    with pytest.raises(BadRequest, match=f"n must be at most {most}") as refusal:
        line.enter("m", places=most + 1)
    assert (refusal.value.param, refusal.value.retry_after) == ("n", None)


def test_one_caller_does_not_take_the_places_of_the_others() -> None:
    line = Admission(max_running=1, max_waiting=3, max_per_caller=2)
    line.enter("m", "ann")
    line.enter("m", "ann")
    with pytest.raises(OverLimit, match="You have 2 requests in flight at m") as refusal:
        line.enter("m", "ann")
    assert (refusal.value.status, refusal.value.code) == (429, "too_many_requests_in_flight")
    assert refusal.value.details == {"in_flight": 2, "max_per_caller": 2}
    assert refusal.value.retry_after == 4
    line.enter("m", "ben")
    line.leave("ann")
    line.enter("m", "ann")


def test_a_caller_with_nothing_in_flight_is_forgotten() -> None:
    line = Admission(max_per_caller=1)
    for number in range(1000):
        line.enter("m", f"caller {number}")
        line.leave(f"caller {number}")
    assert not line._callers


@pytest.mark.parametrize(("caller", "places"), [("", 1), ("ann", 2), ("ben", 1)])
def test_leaving_without_having_come_is_a_bug(caller: str, places: int) -> None:
    line = Admission()
    line.enter("m", "ann")
    with pytest.raises(ValueError, match="nobody"):
        line.leave(caller, places)
