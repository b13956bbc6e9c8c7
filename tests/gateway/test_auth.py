"""Access: nobody from outside without a key, and no detour around that."""

import pytest

from cortex.testing import AsgiClient

CHAT = "/v1/chat/completions"
KEYS = [{"name": "alice", "key": "sk-1"}]


async def status(world, path="/v1/models", *, peer="127.0.0.1", **headers):
    client = AsgiClient(world.gateway.app, peer=(peer, 1) if peer else None)
    reply = await client.get(path, headers={name.replace("_", "-"): v for name, v in headers.items()})
    return reply.status, reply


@pytest.mark.parametrize("peer", ["127.0.0.1", "127.8.8.8", "::1", "::ffff:127.0.0.1"])
async def test_without_keys_this_machine_is_served(world, peer):
    assert (await status(world, peer=peer))[0] == 200


@pytest.mark.parametrize("peer", ["192.168.1.9", "10.0.0.1", "::ffff:10.0.0.1", "fe80::1", "nonsense", None])
async def test_without_keys_others_are_told_how_to_add_one(world, peer):
    code, reply = await status(world, peer=peer)
    assert code == 401
    assert "[[keys]]" in reply.json()["error"]["message"]
    assert reply.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("header", ["forwarded", "x_forwarded_for", "x_real_ip", "via"])
async def test_what_a_proxy_forwards_is_not_from_this_machine(world, header):
    assert (await status(world, **{header: "127.0.0.1"}))[0] == 401


@pytest.mark.parametrize(
    ("origin", "code"),
    [
        ("http://localhost:3000", 200),
        ("http://127.0.0.1", 200),
        ("http://[::1]:8080", 200),
        ("https://elsewhere.example", 401),
        ("http://localhost.elsewhere.example", 401),
        ("null", 401),
        ("http://[", 401),
    ],
)
async def test_another_sites_page_in_a_browser_here_is_not_this_machine(world, origin, code):
    assert (await status(world, origin=origin))[0] == code


async def test_keys_are_needed_from_everywhere_once_there_are_any(make_world):
    world = await make_world(keys=KEYS)
    assert (await status(world))[0] == 401
    assert (await status(world, authorization="Bearer wrong"))[0] == 401
    assert (await status(world, peer="10.0.0.1", authorization="Bearer sk-1"))[0] == 200


async def test_anonymous_access_opens_it_and_tolerates_placeholder_keys(make_world):
    world = await make_world(allow_anonymous=True, keys=KEYS)
    assert (await status(world, peer="10.0.0.1"))[0] == 200
    assert (await status(world, peer="10.0.0.1", authorization="Bearer whatever"))[0] == 200


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/m", "/nodes"])
async def test_every_route_but_health_is_guarded(world, path):
    assert (await status(world, path, peer="10.0.0.1"))[0] == 401
    assert (await status(world, "/health", peer="10.0.0.1"))[0] == 200


@pytest.mark.parametrize("path", [CHAT, "/nodes/a/load", "/nodes/a/unload"])
async def test_a_refused_post_reaches_no_node(world, path):
    client = AsgiClient(world.gateway.app, peer=("10.0.0.1", 1))
    assert (await client.post(path, json=world.chat())).status == 401
    assert world.nodes["a"].bodies == []
    assert world.nodes["a"].orders == []
