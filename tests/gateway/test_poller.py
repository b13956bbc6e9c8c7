"""The poller: one miss is nothing, three are a lost node, and one slow node delays nobody."""

import asyncio

import pytest

from cortex.gateway.observe import Observers
from cortex.gateway.poller import Poller
from cortex.hookspecs import NodePolled
from cortex.testing import FakeNode
from cortex.testing.clock import settle

CHAT = "/v1/chat/completions"


async def statuses(world):
    listed = (await world.client.get("/v1/models")).json()["data"]
    return {card["id"]: (card["loaded"], [place["status"] for place in card["locations"]]) for card in listed}


async def test_three_misses_lose_a_node_and_one_poll_brings_it_back(make_world):
    world = await make_world({"a": FakeNode(["m"]), "b": FakeNode(["n"])})
    world.network.kill("http://a:13131")
    for _ in range(2):
        await world.poll()
        assert (await statuses(world))["m"] == (True, ["loaded"])
    await world.poll()
    assert await statuses(world) == {"m": (False, ["unreachable"]), "n": (True, ["loaded"])}
    reply = await world.client.post(CHAT, json=world.chat("m"))
    assert (reply.status, reply.headers["retry-after"]) == (503, "5")
    assert (await world.client.post(CHAT, json=world.chat("n"))).status == 200
    world.network.revive("http://a:13131")
    await world.poll()
    assert (await statuses(world))["m"] == (True, ["loaded"])
    assert (await world.client.post(CHAT, json=world.chat("m"))).status == 200


async def test_a_lost_node_ends_what_waits_for_it(world):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    async with world.client.open("POST", CHAT, json=world.chat()) as exchange:
        await node.arrived.wait()
        node.garbage = b"nonsense"  # the connection stands, but polls no longer make sense
        for _ in range(3):
            await world.poll()
        reply = await exchange.reply()
    assert (reply.status, reply.json()["error"]["code"]) == (502, "node_lost")


@pytest.mark.parametrize("garbage", [b"<html>", b'{"id":1}', b'[{"id":1}]', b"\xff"])
async def test_a_node_that_answers_garbage_is_a_lost_node_with_a_reason(world, garbage):
    world.nodes["a"].garbage = garbage
    for _ in range(3):
        await world.poll()
    [view] = (await world.client.get("/nodes")).json()
    assert not view["up"]
    assert "GET /models" in view["detail"]


async def test_a_node_that_was_never_up_is_logged_once_for_each_reason(make_world, caplog):
    node = FakeNode()
    node.garbage = b"nonsense"
    with caplog.at_level("WARNING", "cortex.poller"):
        world = await make_world({"a": node})
        for _ in range(4):
            await world.poll()
        world.network.kill("http://a:13131")
        for _ in range(2):
            await world.poll()
    assert [record.args[0] for record in caplog.records] == ["a", "a"]
    assert "something else" in caplog.messages[0]
    assert "Connection refused" in caplog.messages[1]


async def test_looks_at_a_node_follow_each_other(world):
    """An order wants a look of its own: one that began before its end might tell what was before."""
    node, poller = world.gateway.fleet.nodes["a"], world.gateway.poller
    fake = world.nodes["a"]
    answers = []
    models, go = node.client.models, asyncio.Event()

    async def slowly():
        found = await models()
        answers.append(len(found))
        await go.wait()
        return found

    node.client.models = slowly
    first = asyncio.create_task(poller.poll(node))
    while not answers:
        await asyncio.sleep(0)
    fake.add("n")
    second = asyncio.create_task(poller.poll(node))
    await settle()
    assert answers == [1]
    go.set()
    await asyncio.gather(first, second)
    assert answers == [1, 2]
    assert set(node.models) == {"m", "n"}


async def test_missing_health_does_not_lose_a_node(world):
    world.nodes["a"].broken = {"/health", "/discovery"}
    for _ in range(4):
        await world.poll()
    assert world.gateway.fleet.nodes["a"].up


async def test_observers_hear_of_every_poll(world):
    event = world.recorder.of(NodePolled)[-1]
    assert (event.node, event.up, dict(event.states)) == ("a", True, {"m": "loaded"})
    assert 'cortex_node_up{node="a"} 1' in await world.metrics()
    world.network.kill("http://a:13131")
    for _ in range(3):
        await world.poll()
    text = await world.metrics()
    assert 'cortex_node_up{node="a"} 0' in text
    assert "cortex_model_state{" not in text


async def test_one_node_that_hangs_delays_nobody(make_world):
    world = await make_world({"a": FakeNode(["m"]), "b": FakeNode(["n"])})
    world.nodes["a"].silent = {"/models"}
    polled = asyncio.Semaphore(0)

    class Counter:
        name = "counter"

        def on_event(self, event):
            if event.node == "b":
                polled.release()

    poller = Poller(world.gateway.fleet, Observers([Counter()]), interval=0, first_look=0)
    await poller.start()
    for _ in range(5):
        await polled.acquire()
    await poller.stop()
