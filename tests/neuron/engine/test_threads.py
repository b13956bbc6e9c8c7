"""How many threads compute is found by trying, on a clock that the test winds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cortex.neuron.engine.threads import ENOUGH_S, STEPS, best_threads
from cortex.neuron.nn.plan import StepPlan


class Machine:
    """A runner whose steps take what the test says, by count of threads; the first one of each takes more."""

    def __init__(self, seconds: Mapping[int, float], warming: float = 0.0) -> None:
        self.seconds = seconds
        self.warming = warming
        self.now = 0.0
        self.threads: list[int] = []
        self.steps: list[int] = []
        self.plans: list[StepPlan] = []

    def logits(self, plan: StepPlan) -> None:
        count = self.threads[-1]
        self.now += self.seconds[count] + (self.warming if count not in self.steps else 0.0)
        self.steps.append(count)
        self.plans.append(plan)

    def best(self, most: int) -> int:
        return best_threads(self, most, clock=lambda: self.now, set_threads=self.threads.append)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({8: 0.010, 4: 0.012, 2: 0.020, 1: 0.040}, 8),
        ({8: 0.040, 4: 0.020, 2: 0.011, 1: 0.012}, 2),
        ({8: 0.010, 4: 0.0098, 2: 0.0097, 1: 0.0096}, 8),
        ({8: 0.010, 4: 0.0098, 2: 0.0097, 1: 0.0090}, 1),
        ({6: 0.010, 3: 0.005, 1: 0.009}, 3),
        ({1: 0.010}, 1),
    ],
    ids=["all", "few", "hardly-faster", "at-last-faster", "odd", "one"],
)
def test_the_fewest_are_taken_that_are_clearly_faster(seconds: dict[int, float], best: int) -> None:
    machine = Machine(seconds)
    assert machine.best(max(seconds)) == best
    assert machine.threads == sorted(seconds, reverse=True), "each was tried once"


def test_the_first_step_of_a_count_is_not_measured() -> None:
    assert Machine({2: 0.010, 1: 0.011}, warming=5.0).best(2) == 2


def test_the_shortest_step_counts_whoever_else_took_the_cores_meanwhile() -> None:
    machine = Machine({2: 0.010, 1: 0.011})
    disturbed = iter([0.0, 0.2, 0.0] + [0.0] * 20)
    plain = machine.logits

    def logits(plan: StepPlan) -> None:
        plain(plan)
        machine.now += next(disturbed)

    machine.logits = logits  # type: ignore[method-assign]
    assert machine.best(2) == 2


def test_slow_steps_are_not_tried_for_long() -> None:
    machine = Machine({4: 10.0, 2: 0.1, 1: 0.01})
    assert machine.best(4) == 1
    assert machine.steps.count(4) == 2, "the one that warms up and one that is measured"
    assert machine.steps.count(1) == STEPS + 1
    assert machine.now < 20 + 2 * (ENOUGH_S + 0.2)


def test_what_is_tried_is_the_decoding_of_one_token() -> None:
    machine = Machine({1: 0.01})
    machine.best(1)
    plan = machine.plans[0]
    assert (plan.ids, plan.wanted, plan.positions, plan.copies) == ([0], [0], [0], [])
