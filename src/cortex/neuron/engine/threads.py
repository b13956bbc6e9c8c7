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
ENOUGH_S: Final = 0.2
"""A count of threads is not tried for longer."""
GAIN: Final = 0.9
"""Fewer threads are looked at only if they decode so much faster: two measurements are never the same."""
PROMPT: Final = 16
"""Tokens of the prefill by which those are judged too."""


class Computes(Protocol):
    def logits(self, plan: StepPlan) -> object: ...


def best_threads(
    runner: Computes,
    most: int,
    prompt: int,
    *,
    clock: Callable[[], float] = time.perf_counter,
    set_threads: Callable[[int], None] = torch.set_num_threads,
) -> int:
    """The count in {most, most/2, most/4, ...} for which the product of two times is smallest: of one token
    that is decoded, and of `prompt` tokens of prefill, which want more threads than a token can feed.
    """

    def times(counts: list[int], tokens: int) -> dict[int, float]:
        found = {}
        for count in counts:
            set_threads(count)
            found[count] = _step_seconds(runner, tokens, clock)
        return found

    counts = [most]
    while counts[-1] > 1:
        counts.append(counts[-1] // 2)
    decode = times(counts, 1)
    worthy = [most, *(count for count in counts[1:] if decode[count] < GAIN * decode[most])]
    if len(worthy) == 1:
        return most
    prefill = times(worthy, prompt)
    return min(worthy, key=lambda count: decode[count] * prefill[count])


def _step_seconds(runner: Computes, tokens: int, clock: Callable[[], float]) -> float:
    plan = StepPlan([0] * tokens, [Segment(0, tokens, [(0, tokens)], slot=0)], [tokens - 1])
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
