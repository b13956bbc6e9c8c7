"""Streams that decode while a long prompt is read: how long they stall, and how much the prompt pays.

Three runs: a full batch of streams alone, the long prompt alone, and a new one beside some streams.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from time import perf_counter
from typing import Final

from .adapter import Adapter, Trace
from .models import Prompt
from .probes import Figures, run, streams, under_way

_ENDLESS: Final = 1800
"""Tokens of a stream that must not end before the long prompt is read. They are cancelled then."""


async def measure(
    adapter: Adapter, batch: list[Prompt], tokens: int, alone: Prompt, beside: Prompt, decoding: list[Prompt]
) -> Figures:
    """`value` is the worst gap of the `decoding` streams from the long prompt's submission to its first
    token, over the median gap of `batch`, a full batch without prefill; `share` is the long prompt's rate
    over its rate alone.
    """
    usual = (await streams(adapter, batch, tokens))["median_gap"]
    solo = await run(adapter, alone, 1)
    traces = [Trace() for _ in decoding]
    tasks = [
        asyncio.create_task(adapter.generate(prompt, _ENDLESS, trace))
        for prompt, trace in zip(decoding, traces, strict=True)
    ]
    try:
        waiting = asyncio.create_task(under_way(traces))
        await asyncio.wait([waiting, *tasks], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        long = await run(adapter, beside, 1)
        ended = sum(task.done() for task in tasks)
    finally:
        for task in tasks:
            task.cancel()
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    failed = [end for end in ends if isinstance(end, Exception)]
    if failed:
        raise failed[0]
    window = (long.started, long.times[0])
    gaps = [gap for trace in traces for gap in _within(trace, *window)]
    rates = [len(p["ids"]) / trace.first for p, trace in ((alone, solo), (beside, long))]
    return {
        "value": max(gaps) / usual,
        "share": rates[1] / rates[0],
        "worst_gap": max(gaps),
        "median_gap": statistics.median(gaps),
        "usual_gap": usual,
        "solo_rate": rates[0],
        "rate": rates[1],
        "ended_early": ended,
        "seconds": perf_counter() - long.started,
    }


def _within(trace: Trace, start: float, end: float) -> list[float]:
    """Gaps of which a part lies between `start` and `end`; a stream that stalls to the end has one too."""
    moments = sorted(set(trace.times)) or [trace.started]
    before = [moment for moment in moments if moment <= start][-1:] or [start]
    inside = [moment for moment in moments if start < moment < end]
    after = [moment for moment in moments if moment >= end][:1] or [end]
    edges = [*before, *inside, *after]
    return [later - earlier for earlier, later in itertools.pairwise(edges)]
