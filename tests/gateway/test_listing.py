"""The merged catalogue, the health and the nodes: what is told is what is so."""

import msgspec

from cortex import __version__
from cortex.config import ModelsConfig
from cortex.testing import FakeNode
from cortex.wire.node import Limit

CATALOGUE = msgspec.convert(
    {
        "models": [
            {"id": "m", "limit": {"context": 99}, "cost": {"input": 1.5, "output": 0.0}},
            {"id": "cold", "limit": {"context": 8192, "output": 100}, "capabilities": ["text"]},
        ],
        "aliases": {"nick": "m", "dangling": "nothing"},
    },
    ModelsConfig,
)


async def cards(world):
    body = (await world.client.get("/v1/models")).json()
    return {card["id"]: card for card in body["data"]}


async def test_nodes_and_catalogue_make_one_listing(make_world):
    world = await make_world({"a": FakeNode(["m", "only-a"]), "b": FakeNode(["m"])}, CATALOGUE)
    listed = await cards(world)
    assert list(listed) == ["cold", "m", "only-a", "nick"]
    assert listed["m"]["locations"] == [
        {"node": "a", "status": "loaded"},
        {"node": "b", "status": "loaded"},
    ]
    assert (listed["cold"]["loaded"], listed["cold"]["locations"]) == (False, [])
    assert listed["cold"]["limit"] == {"context": 8192, "input": 0, "output": 100}
    assert listed["m"]["cost"] == {"input": 1.5, "output": 0.0}
    assert "cost" not in listed["only-a"]


async def test_the_nodes_smallest_limit_counts_not_the_catalogues(make_world):
    world = await make_world({"a": FakeNode([]), "b": FakeNode([])}, CATALOGUE)
    world.nodes["a"].add("m", limit=Limit(context=4096), capabilities=["text"], tool_call=True)
    world.nodes["b"].add("m", limit=Limit(context=2048), capabilities=["vision", "text"])
    await world.poll()
    card = (await cards(world))["m"]
    assert (card["limit"]["context"], card["max_model_len"]) == (2048, 2048)
    assert card["capabilities"] == ["text", "vision"]
    assert card["tool_call"] is True


async def test_an_alias_mirrors_its_model_under_its_own_name(make_world):
    world = await make_world(models=CATALOGUE)
    listed = await cards(world)
    assert listed["nick"]["alias_of"] == "m"
    assert listed["nick"]["loaded"] is True
    assert "dangling" not in listed
    assert (await world.client.get("/v1/models/nick")).json() == listed["nick"]


async def test_one_model_is_shown_whatever_its_name(make_world):
    world = await make_world({"a": FakeNode(["org/name", "m"])})
    for path in ("/v1/models/org/name", "/v1/models/org%2Fname"):
        assert (await world.client.get(path)).json()["id"] == "org/name"
    missing = await world.client.get("/v1/models/absent")
    assert (missing.status, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_health_tells_of_nodes_and_of_models_that_cannot_serve(make_world):
    world = await make_world({"a": FakeNode(), "b": FakeNode()})
    assert (await world.client.get("/health")).json() == {
        "status": "ok",
        "nodes": {"healthy": 2, "total": 2},
    }
    world.nodes["a"].add("m", status="failed", servable={"ok": False, "reason": "died", "detail": "killed"})
    await world.poll()
    health = (await world.client.get("/health")).json()
    assert health["status"] == "impaired"
    assert health["unservable"] == [{"node": "a", "model": "m", "reason": "died", "detail": "killed"}]


async def test_health_without_nodes_is_degraded_and_still_answers(make_world):
    world = await make_world({})
    reply = await world.client.get("/health")
    assert (reply.status, reply.json()) == (
        200,
        {"status": "degraded", "nodes": {"healthy": 0, "total": 0}},
    )


async def test_nodes_are_shown_with_their_models(world):
    [view] = (await world.client.get("/nodes")).json()
    assert (view["name"], view["endpoint"], view["up"]) == ("a", "http://a:13131", True)
    assert view["version"] == __version__
    assert [model["id"] for model in view["models"]] == ["m"]
