"""Agents that send their whole conversation again with every turn: how much of it is computed again.

Needs an engine that tells after each step how many prompt tokens it has computed: ours.
"""

from __future__ import annotations

import asyncio
from typing import Any

from cortex.hookspecs import EngineStep

from .adapter import Trace
from .models import Prompt
from .probes import Figures


class _Meter:
    """Adds up what the engine's steps tell."""

    def __init__(self) -> None:
        self.prefilled = self.queried = self.hit = 0

    def seen(self, step: EngineStep) -> None:
        self.prefilled += step.prefill_tokens
        self.queried += step.prefix_queried_tokens
        self.hit += step.prefix_hit_tokens


async def measure(adapter: Any, system: Prompt, turns: list[list[Prompt]], reply: int) -> Figures:
    """All agents at once, each with its own `turns` over the same `system` prompt.

    New is what no earlier request, its reply included, had as a prefix: the system prompt once, each
    user turn, and of each reply that is sent again its last token, which was sampled but never computed.
    """
    meter = _Meter()
    adapter.watch(meter.seen)
    async with asyncio.TaskGroup() as group:
        for each in turns:
            group.create_task(_agent(adapter, system["ids"], [turn["ids"] for turn in each], reply))
    users = sum(len(turn["ids"]) for each in turns for turn in each)
    again = sum(len(each) - 1 for each in turns)
    new = len(system["ids"]) + users + again
    sent = sum(_sent(len(system["ids"]), [len(turn["ids"]) for turn in each], reply) for each in turns)
    return {
        "value": meter.prefilled / new,
        "prefilled": meter.prefilled,
        "new": new,
        "sent": sent,
        "queried": meter.queried,
        "hit": meter.hit,
    }


async def _agent(adapter: Any, system: list[int], turns: list[list[int]], reply: int) -> None:
    history = list(system)
    for turn in turns:
        history += turn
        trace = Trace()
        await adapter.generate({"ids": history}, reply, trace)
        history += trace.ids


def _sent(system: int, turns: list[int], reply: int) -> int:
    """Prompt tokens of all requests of one agent."""
    length, sent = system, 0
    for turn in turns:
        sent += length + turn
        length += turn + reply
    return sent
