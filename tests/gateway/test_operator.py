"""Orders to single nodes: forwarded as they came, answered as the node answers."""

from cortex.wire.errors import Conflict


async def test_a_load_order_reaches_the_named_node_as_it_came(world):
    body = b'{ "model_id": "x", "unheard_of": 1 }'
    reply = await world.client.post("/nodes/a/load", body=body)
    assert (reply.status, reply.json()["status"]) == (200, "loaded")
    assert world.nodes["a"].orders == [("/models/load", body)]


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
