"""Orders to single nodes: forwarded as they came, answered as the node answers."""

import pytest

from cortex.wire.errors import Conflict, LoadFailed


async def test_a_load_order_reaches_the_named_node_as_it_came(world):
    body = b'{ "model_id": "x", "unheard_of": 1 }'
    reply = await world.client.post("/nodes/a/load", body=body)
    assert (reply.status, reply.json()["status"]) == (200, "loaded")
    assert world.nodes["a"].orders == [("/models/load", body)]


@pytest.mark.parametrize("order", ["load", "unload"])
async def test_what_an_order_has_done_is_seen_before_it_is_told(world, order):
    node = world.nodes["a"]
    done = {"load": lambda: node.add("x"), "unload": lambda: node.reports.pop("m")}
    node.on_order = done[order]
    await world.client.post(f"/nodes/a/{order}", json={"model_id": "x"})
    listed = [card["id"] for card in (await world.client.get("/v1/models")).json()["data"]]
    assert listed == {"load": ["m", "x"], "unload": []}[order]


async def test_what_a_load_with_progress_has_done_is_seen_before_its_last_event(world):
    node = world.nodes["a"]
    node.on_order = lambda: node.add("x")
    headers = {"accept": "text/event-stream"}
    async with world.client.open("POST", "/nodes/a/load", json={}, headers=headers) as exchange:
        last = await exchange.chunk()
        assert b'"event":"loaded"' in last
        assert world.gateway.fleet.knows("x")
        await exchange.reply()


async def test_what_a_refused_load_has_left_is_seen_too(world):
    node = world.nodes["a"]
    node.refusal = LoadFailed("the disk is full")
    node.on_order = lambda: node.add("x", status="failed")
    assert (await world.client.post("/nodes/a/load", json={"model_id": "x"})).status == 503
    assert world.gateway.fleet.nodes["a"].models["x"].status == "failed"


async def test_unload_too(world):
    await world.client.post("/nodes/a/unload", json={"model_id": "m"})
    assert world.nodes["a"].orders == [("/models/unload", b'{"model_id":"m"}')]


async def test_a_nodes_no_keeps_its_numbers(world):
    world.nodes["a"].refusal = Conflict("no room", code="no_memory", details={"ledger": [1, 2]})
    reply = await world.client.post("/nodes/a/load", json={"model_id": "x"})
    assert reply.status == 409
    assert reply.json()["error"]["ledger"] == [1, 2]
    assert reply.json()["error"]["code"] == "no_memory"


async def test_an_unknown_node_is_named_with_those_that_there_are(world):
    reply = await world.client.post("/nodes/nobody/load", json={})
    assert reply.status == 404
    assert "'nobody'" in reply.json()["error"]["message"]
    assert ": a." in reply.json()["error"]["message"]


async def test_a_node_that_is_away_is_a_502(world):
    world.network.kill("http://a:13131")
    assert (await world.client.post("/nodes/a/load", json={})).status == 502
