"""How many threads compute is found by trying, on a clock that the test winds."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from cortex.neuron.engine.threads import ENOUGH_S, STEPS, best_threads
from cortex.neuron.nn.plan import StepPlan


class Machine:
    """A runner whose steps take what the test says, by count of threads; the first one of each takes more.
    A token of prefill takes `prefill` by that count, where it is said.
    """

    def __init__(
        self,
        seconds: Mapping[int, float],
        warming: float = 0.0,
        prefill: Mapping[int, float] | None = None,
    ) -> None:
        self.seconds = seconds
        self.warming = warming
        self.prefill = prefill or seconds
        self.now = 0.0
        self.threads: list[int] = []
        self.steps: list[int] = []
        self.plans: list[StepPlan] = []

    def logits(self, plan: StepPlan) -> None:
        count, tokens = self.threads[-1], len(plan.ids)
        self.now += self.seconds[count] if tokens == 1 else self.prefill[count] * tokens
        self.now += self.warming if count not in self.steps else 0.0
        self.steps.append(count)
        self.plans.append(plan)

    def best(self, most: int, prompt: int = 16) -> int:
        return best_threads(self, most, prompt, clock=lambda: self.now, set_threads=self.threads.append)


@pytest.mark.parametrize(
    ("seconds", "best"),
    [
        ({8: 0.010, 4: 0.012, 2: 0.020, 1: 0.040}, 8),
        ({8: 0.040, 4: 0.020, 2: 0.011, 1: 0.012}, 2),
        ({8: 0.010, 4: 0.0098, 2: 0.0097, 1: 0.0096}, 8),
        ({8: 0.010, 4: 0.0098, 2: 0.0097, 1: 0.0080}, 1),
        ({6: 0.010, 3: 0.005, 1: 0.009}, 3),
        ({1: 0.010}, 1),
    ],
    ids=["all", "few", "hardly-faster", "at-last-faster", "odd", "one"],
)
def test_the_fewest_are_taken_that_are_clearly_faster(seconds: dict[int, float], best: int) -> None:
    machine = Machine(seconds)
    assert machine.best(max(seconds)) == best
    assert machine.threads[: len(seconds)] == sorted(seconds, reverse=True), "each was tried"


@pytest.mark.parametrize(
    ("prefill", "best"),
    [
        ({8: 0.001, 4: 0.0016, 2: 0.003, 1: 0.006}, 4),
        ({8: 0.001, 4: 0.002, 2: 0.004, 1: 0.008}, 8),
        ({8: 0.001, 4: 0.001, 2: 0.001, 1: 0.002}, 2),
    ],
    ids=["a-compromise", "prefill-feeds-them-all", "too-small-for-any"],
)
def test_faster_decode_must_be_worth_its_price_in_prefill(prefill: dict[int, float], best: int) -> None:
    machine = Machine({8: 0.020, 4: 0.011, 2: 0.0105, 1: 0.015}, prefill=prefill)
    assert machine.best(8) == best


def test_where_fewer_do_not_decode_faster_no_prefill_is_tried() -> None:
    machine = Machine({2: 0.010, 1: 0.0095})
    assert machine.best(2) == 2
    assert {len(plan.ids) for plan in machine.plans} == {1}


def test_no_longer_prompt_is_tried_than_there_is_room_for() -> None:
    machine = Machine({2: 0.010, 1: 0.005})
    machine.best(2, prompt=3)
    assert {len(plan.ids) for plan in machine.plans} == {1, 3}
    assert machine.plans[-1].segments[0].runs == [(0, 3)]


def test_the_first_step_of_a_count_is_not_measured() -> None:
    assert Machine({2: 0.010, 1: 0.011}, warming=5.0).best(2) == 2


def test_the_shortest_step_counts_whoever_else_took_the_cores_meanwhile() -> None:
    machine = Machine({2: 0.010, 1: 0.011})
    disturbed = iter([0.0, 0.1, 0.0] + [0.0] * 20)
    plain = machine.logits

    def logits(plan: StepPlan) -> None:
        plain(plan)
        machine.now += next(disturbed)

    machine.logits = logits  # type: ignore[method-assign]
    assert machine.best(2) == 2


def test_slow_steps_are_not_tried_for_long() -> None:
    machine = Machine({4: 0.01, 2: 10.0, 1: 10.0})
    assert machine.best(4) == 4
    assert machine.steps.count(4) == STEPS + 1
    assert machine.steps.count(2) == 2, "the one that warms up and one that is measured"
    assert machine.now < 40 + ENOUGH_S


def test_what_is_tried_is_the_decoding_of_one_token() -> None:
    machine = Machine({1: 0.01})
    machine.best(1)
    plan = machine.plans[0]
    assert (plan.ids, plan.wanted, plan.positions, plan.copies) == ([0], [0], [0], [])
