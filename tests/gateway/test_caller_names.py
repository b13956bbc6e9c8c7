"""Which caller the gateway names to its nodes: the key's, never what a client says."""

import pytest

CHAT = "/v1/chat/completions"
KEYS = [{"name": "alice", "key": "sk-1"}, {"name": "bob's täglich\r\n", "key": "sk-2"}]


async def named(world, **headers):
    sent = {name.replace("_", "-"): value for name, value in headers.items()}
    reply = await world.client.post(CHAT, json=world.chat(), headers=sent)
    assert reply.status == 200
    return world.nodes["a"].headers[-1].get("x-cortex-caller")


@pytest.mark.parametrize("stream", [False, True])
async def test_the_name_of_the_key_goes_to_the_node(make_world, stream):
    world = await make_world(keys=KEYS)
    headers = {"authorization": "Bearer sk-1"}
    assert (await world.client.post(CHAT, json=world.chat(stream=stream), headers=headers)).status == 200
    assert world.nodes["a"].headers[0]["x-cortex-caller"] == "alice"


async def test_any_name_fits_into_a_header(make_world):
    world = await make_world(keys=KEYS)
    assert await named(world, authorization="Bearer sk-2") == "bob%27s%20t%C3%A4glich%0D%0A"


async def test_a_clients_own_header_is_not_forwarded(make_world):
    world = await make_world(keys=KEYS)
    assert await named(world, authorization="Bearer sk-1", x_cortex_caller="bob") == "alice"


async def test_without_a_key_nobody_is_named(make_world):
    world = await make_world(allow_anonymous=True, keys=KEYS)
    assert await named(world, x_cortex_caller="bob") is None
    assert await named(world, authorization="Bearer unknown", x_cortex_caller="bob") is None
