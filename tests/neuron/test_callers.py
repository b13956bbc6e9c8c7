"""Who counts as one caller of a node, and what one caller may have in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from cortex.config import AdmissionSection
from cortex.testing import AsgiClient

CHAT = "/v1/chat/completions"
BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
TOKEN = {"authorization": "Bearer secret"}


class Line:
    """A node where a caller may have two requests, and requests stay until they are let go."""

    def __init__(self, make_node: Callable[..., Any]) -> None:
        admission = AdmissionSection(max_running=1, max_waiting=9, max_per_caller=2)
        self.node = make_node(node_token="secret", admission=admission)
        self.gate = asyncio.Event()
        self.asked: list[asyncio.Task[Any]] = []

    async def start(self) -> None:
        await self.node.neuron.start()
        self.node.client = AsgiClient(self.node.neuron.app, headers=TOKEN)
        engine = await self.node.load()
        engine.before_step = lambda request_id, step: self.gate.wait()

    async def fill(self, count: int, peer: str = "10.0.0.1", **headers: str) -> None:
        for _ in range(count):
            self.asked.append(asyncio.create_task(self.ask(peer, **headers)))
        engine = self.node.engines["m"]
        await engine.until(lambda: len(engine.waiting) == len(self.asked))

    async def ask(self, peer: str = "10.0.0.1", **headers: str) -> Any:
        client = AsgiClient(self.node.neuron.app, peer=(peer, 1), headers=TOKEN)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await client.post(CHAT, json=BODY, headers=named)

    async def let_go(self) -> None:
        self.gate.set()
        assert {(await task).status for task in self.asked} <= {200}


@pytest.fixture
async def line(make_node: Callable[..., Any]) -> AsyncIterator[Line]:
    line = Line(make_node)
    await line.start()
    yield line
    await line.let_go()
    await line.node.nothing_left()
    await line.node.neuron.stop()


async def test_one_request_too_many_is_429_with_the_numbers(line: Line) -> None:
    await line.fill(2)
    reply = await line.ask()
    error = reply.json()["error"]
    assert (reply.status, error["code"], error["type"]) == (
        429,
        "too_many_requests_in_flight",
        "rate_limit_error",
    )
    assert (error["in_flight"], error["max_per_caller"]) == (2, 2)
    assert 1 <= int(reply.headers["retry-after"]) <= 60
    refusals = 'neuron_refusals_total{reason="too_many_requests_in_flight"}'
    assert await line.node.sample(refusals) == "1"


async def test_without_a_name_callers_are_told_apart_by_address(line: Line) -> None:
    await line.fill(2, "10.0.0.1")
    await line.fill(2, "10.0.0.2")
    assert (await line.ask("10.0.0.1")).status == (await line.ask("10.0.0.2")).status == 429
    await line.fill(1, "10.0.0.3")


async def test_those_behind_one_gateway_are_told_apart_by_name(line: Line) -> None:
    await line.fill(2, x_cortex_caller="ann")
    await line.fill(2, x_cortex_caller="ben")
    await line.fill(1)
    assert (await line.ask(x_cortex_caller="ann")).status == 429
    assert (await line.ask("10.0.0.2", x_cortex_caller="ben")).status == 429


async def test_who_is_done_may_come_again(line: Line) -> None:
    await line.fill(2)
    assert (await line.ask()).status == 429
    await line.let_go()
    assert (await line.ask()).status == 200


async def test_a_request_for_more_than_there_will_ever_be_is_400(line: Line) -> None:
    client = AsgiClient(line.node.neuron.app, headers=TOKEN)
    reply = await client.post(CHAT, json={**BODY, "n": 3})
    assert (reply.status, reply.json()["error"]["param"]) == (400, "n")
    assert "at most 2" in reply.json()["error"]["message"]
