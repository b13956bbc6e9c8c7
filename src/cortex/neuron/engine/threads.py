"""Chooses by measurement how many threads compute a model's steps.

More threads than a step can feed only wait for each other. Knows nothing of the model but that it takes
plans.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, Protocol

import torch

from cortex.neuron.nn.plan import Segment, StepPlan

STEPS: Final = 5
ENOUGH_S: Final = 0.5
"""A count of threads is not tried for longer."""
GAIN: Final = 0.95
"""Fewer threads are taken only if they are so much faster: prefill wants all of them."""


class Computes(Protocol):
    def logits(self, plan: StepPlan) -> object: ...


def best_threads(
    runner: Computes,
    most: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    set_threads: Callable[[int], None] = torch.set_num_threads,
) -> int:
    """The count in {most, most/2, most/4, ...} with which one token is decoded fastest."""
    best, shortest = most, float("inf")
    count = most
    while count >= 1:
        set_threads(count)
        took = _step_seconds(runner, clock)
        if took < shortest * (GAIN if count < most else 1):
            best, shortest = count, took
        count //= 2
    return best


def _step_seconds(runner: Computes, clock: Callable[[], float]) -> float:
    plan = StepPlan([0], [Segment(0, 1, [(0, 1)], slot=0)], [0])
    runner.logits(plan)  # the first one warms caches and starts threads
    shortest = float("inf")
    began = clock()
    for _ in range(STEPS):
        start = clock()
        runner.logits(plan)
        shortest = min(shortest, clock() - start)
        if clock() - began > ENOUGH_S:
            break
    return shortest
