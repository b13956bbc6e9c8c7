from __future__ import annotations

import pytest

from cortex.neuron.admission import Admission
from cortex.wire.errors import Busy


def test_one_runs_and_the_rest_wait() -> None:
    line = Admission(max_running=1, max_waiting=2)
    line.enter("m")
    line.enter("m")
    assert (line.running, line.waiting) == (1, 1)
    line.leave()
    assert (line.running, line.waiting) == (1, 0)
    line.leave()
    assert (line.running, line.waiting) == (0, 0)


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


def test_leaving_an_empty_line_is_a_bug() -> None:
    with pytest.raises(ValueError, match="nobody"):
        Admission().leave()
