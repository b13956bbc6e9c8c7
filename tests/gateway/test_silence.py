"""Silence: a node that works may be silent, a node that forgot the request may not, and clients see life."""

import asyncio

import pytest

CHAT = "/v1/chat/completions"


async def test_a_waiting_stream_gets_keep_alives_that_are_no_events(world):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    async with world.client.open("POST", CHAT, json=world.chat(stream=True)) as exchange:
        await node.arrived.wait()
        await world.clock.advance(10)
        assert await exchange.chunk() == b": keep-alive\n\n"
        for _ in range(3):
            node.gate.release()
        assert b'"content":"Hel"' in await exchange.chunk()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_cold_load_is_a_wait_in_which_a_stream_shows_life(world, stream):
    node = world.nodes["a"]
    node.add("m", status="loading", servable={"ok": False, "reason": "loading"})
    await world.poll()
    node.gate = asyncio.Semaphore(0)
    async with world.client.open("POST", CHAT, json=world.chat(stream=stream)) as exchange:
        await node.arrived.wait()
        await world.poll()
        for _ in range(40):  # longer than a node may be silent that does not list the request
            await world.clock.advance(10)
            if stream:
                assert await exchange.chunk() == b": keep-alive\n\n"
        for _ in range(3):
            node.gate.release()
        assert b"lo" in (await exchange.reply()).body


@pytest.mark.parametrize("stream", [False, True])
async def test_a_node_that_lists_the_request_may_be_silent_for_ever(world, stream):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    async with world.client.open("POST", CHAT, json=world.chat(stream=stream)) as exchange:
        await node.arrived.wait()
        await world.poll()
        for _ in range(5):
            await world.clock.advance(300)
        for _ in range(3):
            node.gate.release()
        reply = await exchange.reply()
    assert reply.status == 200
    assert b"lo" in reply.body


async def test_a_node_that_forgot_the_request_times_out(world):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    node.lists_requests = False
    async with world.client.open("POST", CHAT, json=world.chat()) as exchange:
        await node.arrived.wait()
        await world.poll()
        await world.clock.advance(600)  # twice: while the request itself was on its way counts as progress
        reply = await exchange.reply()
    assert (reply.status, reply.json()["error"]["code"]) == (504, "upstream_timeout")
    await node.left.wait()
