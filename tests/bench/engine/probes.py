"""The speed measurements, the same for every engine: prompts and a number of tokens in, figures out.

Run in the engine's own process, between it and nothing but its Python interface.
"""

from __future__ import annotations

import asyncio
import statistics
from time import perf_counter
from typing import Any, Final

from .adapter import Adapter, Trace
from .models import Prompt

Figures = dict[str, Any]
_UNDER_WAY: Final = 4
"""Tokens that a stream must have given to count as decoding."""
_LOOK: Final = 0.002
"""Seconds between two looks at the traces."""


async def load(adapter: Adapter, path: str, warm_up: Prompt, times: int) -> Figures:
    """Load so many times, and keep the last; the first one may find the file outside the page cache."""
    seconds = []
    for number in range(times):
        if number:
            await adapter.close()
        started = perf_counter()
        await adapter.load(path)
        seconds.append(perf_counter() - started)
    await adapter.generate(warm_up, 4, Trace())
    return {"seconds": seconds[-1], "all": seconds, **adapter.facts()}


async def prefill(adapter: Adapter, prompt: Prompt) -> Figures:
    """Prompt tokens a second, until the first token is there."""
    trace = await run(adapter, prompt, 1)
    tokens = trace.prompt_tokens or len(prompt["ids"])
    return {"value": tokens / trace.first, "tokens": tokens, "own": trace.own.get("prefill")}


async def decode(adapter: Adapter, prompt: Prompt, tokens: int) -> Figures:
    """Tokens a second of one stream after its first token."""
    trace = await run(adapter, prompt, tokens)
    return {"value": trace.rate, "tokens": trace.count, "own": trace.own.get("decode")}


async def streams(adapter: Adapter, prompts: list[Prompt], tokens: int) -> Figures:
    """Generated tokens a second of all streams together, from their common start to the last token."""
    traces = [Trace() for _ in prompts]
    started = perf_counter()
    async with asyncio.TaskGroup() as group:
        for prompt, trace in zip(prompts, traces, strict=True):
            group.create_task(adapter.generate(prompt, tokens, trace))
    ended = max(trace.times[-1] for trace in traces)
    count = sum(trace.count for trace in traces)
    gaps = [gap for trace in traces for gap in trace.gaps()]
    return {"value": count / (ended - started), "tokens": count, "median_gap": statistics.median(gaps)}


async def first_token(adapter: Adapter, prompts: list[Prompt], tokens: int, late: Prompt) -> Figures:
    """Seconds to the first token of `late`, which comes while a stream for each of `prompts` decodes."""
    traces = [Trace() for _ in prompts]
    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(adapter.generate(prompt, tokens, trace))
            for prompt, trace in zip(prompts, traces, strict=True)
        ]
        await under_way(traces)
        trace = await run(adapter, late, 1)
        loaded = not any(task.done() for task in tasks)
    return {"value": trace.first, "loaded": loaded}


async def run(adapter: Adapter, prompt: Prompt, tokens: int) -> Trace:
    trace = Trace()
    await adapter.generate(prompt, tokens, trace)
    return trace


async def under_way(traces: list[Trace]) -> None:
    """Waits until every one decodes; an error of a stream's task cancels this wait."""
    while min(len(trace.times) for trace in traces) < _UNDER_WAY:
        await asyncio.sleep(_LOOK)
