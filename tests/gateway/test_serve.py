"""The main path: bytes through untouched, another node where one fails, nobody left behind."""

import asyncio

import msgspec
import pytest

from cortex.config import ModelsConfig
from cortex.gateway.placement import UNREACHED_S
from cortex.hookspecs import RequestEnded, RequestRetried, RequestStarted
from cortex.testing import FakeNode
from cortex.wire import sse
from cortex.wire.errors import BadRequest, Busy, ContextTooLong, LoadFailed, Loading, UnknownModel

CHAT = "/v1/chat/completions"


def texts(body: bytes) -> list[str]:
    chunks = [msgspec.json.decode(e.data) for e in sse.Decoder().feed(body) if e.data.startswith(b"{")]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk.get("choices", ())]
    return [delta["content"] for delta in deltas if delta.get("content")]


def ended(world) -> list[RequestEnded]:
    return world.recorder.of(RequestEnded)


async def test_a_plain_request_passes_both_ways_untouched(world):
    body = b'{ "model": "m", "messages": [{"role":"user","content":"hi"}], "vendor": [1.50] }'
    reply = await world.client.post(CHAT, body=body, headers={"x-request-id": "r-1"})
    assert reply.status == 200
    assert reply.json()["choices"][0]["message"]["content"] == "Hello"
    assert reply.headers["x-request-id"] == "r-1"
    assert world.nodes["a"].bodies == [body]
    assert world.nodes["a"].headers[0]["x-request-id"] == "r-1"
    assert world.nodes["a"].headers[0]["authorization"] == "Bearer token-a"


async def test_a_stream_arrives_event_by_event_as_it_is_produced(world):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    async with world.client.open("POST", CHAT, json=world.chat(stream=True)) as exchange:
        await node.arrived.wait()
        for word in node.words:
            node.gate.release()
            assert texts(await exchange.chunk()) == [word]
        node.gate.release()
        rest = b"".join([chunk async for chunk in exchange.chunks()])
    assert rest.endswith(sse.DONE)


async def test_a_stream_asks_for_usage_and_withholds_what_the_client_did_not_ask(world):
    reply = await world.client.post(CHAT, json=world.chat(stream=True, seed=1))
    sent = msgspec.json.decode(world.nodes["a"].bodies[0])
    assert sent == world.chat(stream=True, seed=1, stream_options={"include_usage": True})
    assert texts(reply.body) == ["Hel", "lo"]
    assert b'"usage"' not in reply.body
    [event] = ended(world)
    assert (event.prompt_tokens, event.completion_tokens, event.outcome) == (3, 2, "ok")


@pytest.mark.parametrize(
    ("options", "sent"),
    [
        ({"include_usage": False, "vendor": [1]}, {"include_usage": True, "vendor": [1]}),
        (None, {"include_usage": True}),
    ],
)
async def test_asking_for_usage_leaves_the_other_options_of_a_stream(world, options, sent):
    reply = await world.client.post(CHAT, json=world.chat(stream=True, stream_options=options))
    assert b'"usage"' not in reply.body
    assert msgspec.json.decode(world.nodes["a"].bodies[0])["stream_options"] == sent


async def test_usage_that_was_asked_for_comes_and_the_body_is_untouched(world):
    body = msgspec.json.encode(world.chat(stream=True, stream_options={"include_usage": True}))
    reply = await world.client.post(CHAT, body=body)
    assert world.nodes["a"].bodies == [body]
    assert b'"usage":{"prompt_tokens":3' in reply.body


async def test_an_alias_reaches_the_node_as_its_model_and_comes_back_as_itself(make_world):
    world = await make_world(models=ModelsConfig(aliases={"nick": "m"}))
    plain = await world.client.post(CHAT, json=world.chat("nick"))
    assert plain.json()["model"] == "nick"
    stream = await world.client.post(CHAT, json=world.chat("nick", stream=True))
    models = {msgspec.json.decode(e.data)["model"] for e in sse.Decoder().feed(stream.body)[:-1]}
    assert models == {"nick"}
    assert [msgspec.json.decode(body)["model"] for body in world.nodes["a"].bodies] == ["m", "m"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_json"),
        (b"null", 400, "invalid_json"),
        (b"{}", 400, "missing_model_field"),
        (b'{"model":"m"}', 400, "invalid_request"),
        (b'{"model":"absent","messages":[{}],"stream":%s}', 404, "model_not_found"),
    ],
)
async def test_what_is_wrong_is_told_with_its_status(world, stream, body, status, code):
    reply = await world.client.post(CHAT, body=body.replace(b"%s", b"true" if stream else b"false"))
    assert (reply.status, reply.json()["error"]["code"]) == (status, code)
    assert world.nodes["a"].bodies == []
    assert ended(world)[0].model == "unknown"
    assert ended(world)[0].outcome == "refused"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_nodes_refusal_keeps_status_wording_and_numbers(world, stream):
    world.nodes["a"].refusal = ContextTooLong("too long by 7", details={"max": 100})
    reply = await world.client.post(CHAT, json=world.chat(stream=stream))
    error = reply.json()["error"]
    assert (reply.status, error["code"]) == (400, "context_length_exceeded")
    assert (error["message"], error["max"]) == ("too long by 7", 100)
    assert ended(world)[0].outcome == "refused"


async def test_a_busy_node_says_when_to_come_back(world):
    world.nodes["a"].refusal = Busy("full", retry_after=4)
    reply = await world.client.post(CHAT, json=world.chat())
    assert (reply.status, reply.headers["retry-after"]) == (503, "4")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "refusal", [Busy("full"), LoadFailed("a file is damaged"), Loading("wait"), UnknownModel("unloaded")]
)
async def test_another_node_serves_when_the_first_cannot(make_world, stream, refusal):
    """Its engine has died and cannot be loaded again, say, while another node has the model."""
    world = await make_world({"a": FakeNode(), "b": FakeNode(words=["from b"])})
    world.nodes["a"].refusal = refusal
    reply = await world.client.post(CHAT, json=world.chat(stream=stream))
    assert reply.status == 200
    assert b"from b" in reply.body
    retried = [(event.node, event.reason) for event in world.recorder.of(RequestRetried)]
    assert retried == [("a", refusal.code)]
    assert [(event.node, event.outcome) for event in ended(world)] == [("b", "ok")]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_model_that_the_only_node_has_just_unloaded_is_no_typing_error(world, stream):
    world.nodes["a"].refusal = UnknownModel("'m' is not loaded on this node.", param="model")
    reply = await world.client.post(CHAT, json=world.chat(stream=stream))
    error = reply.json()["error"]
    assert (reply.status, error["code"], reply.headers["retry-after"]) == (503, "no_capacity", "5")
    assert "not loaded on this node" in error["message"]


async def test_a_node_that_has_unloaded_a_model_is_looked_at_before_its_turn(make_world):
    world = await make_world(poll_interval_s=3600.0)
    await world.gateway.start()
    node = world.nodes["a"]
    node.refusal = UnknownModel("'m' is not loaded on this node.")
    del node.reports["m"]
    assert (await world.client.post(CHAT, json=world.chat())).status == 503
    while world.gateway.fleet.knows("m"):
        await asyncio.sleep(0)


@pytest.mark.parametrize("stream", [False, True])
async def test_another_node_serves_when_the_first_has_gone(make_world, stream):
    world = await make_world({"a": FakeNode(), "b": FakeNode(words=["from b"])})
    world.network.kill("http://a:13131")
    reply = await world.client.post(CHAT, json=world.chat(stream=stream))
    assert b"from b" in reply.body


async def test_a_bad_request_is_not_tried_on_another_node(make_world):
    world = await make_world({"a": FakeNode(), "b": FakeNode()})
    world.nodes["a"].refusal = BadRequest("no such parameter")
    assert (await world.client.post(CHAT, json=world.chat())).status == 400
    assert world.nodes["b"].bodies == []


@pytest.mark.parametrize("garbage", [b"<html>", b"[]", b'{"error":{"message":"no"}}'])
async def test_a_whole_answer_of_garbage_is_a_502(world, garbage):
    world.nodes["a"].garbage = garbage
    reply = await world.client.post(CHAT, json=world.chat())
    assert (reply.status, reply.json()["error"]["code"]) == (502, "node_lost")
    assert ended(world)[0].outcome == "failed"


async def test_a_stream_that_breaks_off_ends_in_an_error_event(world):
    world.nodes["a"].break_after = 1
    reply = await world.client.post(CHAT, json=world.chat(stream=True))
    assert reply.status == 200
    assert texts(reply.body) == ["Hel"]
    last = msgspec.json.decode(sse.Decoder().feed(reply.body)[-1].data)
    assert last["error"]["code"] == "node_lost"
    assert sse.DONE not in reply.body
    [event] = ended(world)
    assert (event.outcome, event.completion_tokens) == ("failed", 1)


async def test_a_node_that_dies_mid_stream_ends_it_with_an_error(world):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(1)
    async with world.client.open("POST", CHAT, json=world.chat(stream=True)) as exchange:
        assert texts(await exchange.chunk()) == ["Hel"]
        world.network.kill("http://a:13131")
        rest = b"".join([chunk async for chunk in exchange.chunks()])
    assert msgspec.json.decode(sse.Decoder().feed(rest)[-1].data)["error"]["code"] == "node_lost"
    assert ended(world)[0].outcome == "failed"


TOLD = sse.encode(b'{"choices":[{"index":0,"delta":{"content":"lost?"}}]}')
FAILED = sse.encode(b'{"error":{"message":"no more","code":"engine_ended"}}')


async def test_what_came_in_one_piece_with_an_error_reaches_the_client_before_it(world):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(1)
    async with world.client.open("POST", CHAT, json=world.chat(stream=True)) as exchange:
        assert texts(await exchange.chunk()) == ["Hel"]
        node.garbage = TOLD + FAILED
        node.gate.release()
        rest = (await exchange.reply()).body
    assert texts(rest) == ["lost?"]
    error = msgspec.json.decode(sse.Decoder().feed(rest)[-1].data)["error"]
    assert (error["code"], error["message"]) == ("engine_ended", "Node a failed: no more")
    [event] = ended(world)
    assert (event.outcome, event.completion_tokens) == ("failed", 2)


async def test_an_error_in_the_first_piece_of_a_stream_leaves_the_request_to_another_node(make_world):
    world = await make_world({"a": FakeNode(), "b": FakeNode()})
    world.nodes["a"].garbage = TOLD + FAILED
    reply = await world.client.post(CHAT, json=world.chat(stream=True))
    assert [len(node.bodies) for node in world.nodes.values()] == [1, 1]
    assert texts(reply.body) == ["Hel", "lo"]
    [event] = ended(world)
    assert (event.outcome, event.completion_tokens) == ("ok", 2)


@pytest.mark.parametrize("where", ["node", "gateway"])
async def test_a_stream_that_is_cut_because_one_stops_ends_with_an_error(world, where):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(1)
    async with world.client.open("POST", CHAT, json=world.chat(stream=True)) as exchange:
        assert texts(await exchange.chunk()) == ["Hel"]
        if where == "node":
            node.app.cut(Busy("This node is stopping.", code="stopping"))
        else:
            world.gateway.cut()
        rest = (await exchange.reply()).body
        await node.left.wait()
    error = msgspec.json.decode(sse.Decoder().feed(rest)[-1].data)["error"]
    assert error["code"] == "stopping"
    assert f"his {where} is stopping" in error["message"]
    assert [event.outcome for event in ended(world)] == ["failed"]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_gateway_cuts_before_its_first_byte_may_be_sent_again(world, stream):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    async with world.client.open("POST", CHAT, json=world.chat(stream=stream)) as exchange:
        await node.arrived.wait()
        world.gateway.cut()
        reply = await exchange.reply()
        await node.left.wait()
    assert (reply.status, reply.json()["error"]["code"]) == (503, "stopping")
    assert reply.headers["retry-after"] == "15"
    assert [(event.outcome, event.status) for event in ended(world)] == [("failed", 503)]


@pytest.mark.parametrize("stream", [False, True])
async def test_what_a_node_cuts_before_its_first_byte_is_served_by_another_one(make_world, stream):
    world = await make_world({"a": FakeNode(), "b": FakeNode()})
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    async with world.client.open("POST", CHAT, json=world.chat(stream=stream)) as exchange:
        await node.arrived.wait()
        node.app.cut(Busy("This node is stopping.", code="stopping"))
        assert (await exchange.reply()).status == 200
    assert len(world.nodes["b"].bodies) == 1


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_stops_the_node(world, stream, phase):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0 if phase == "prefill" else 1)
    async with world.client.open("POST", CHAT, json=world.chat(stream=stream)) as exchange:
        await node.arrived.wait()
        if phase == "decode" and stream:
            assert texts(await exchange.chunk()) == ["Hel"]
        exchange.disconnect()
        await exchange.ended()
        await node.left.wait()
    assert node.running == []
    assert world.gateway.fleet.nodes["a"].in_flight == {}
    assert [event.outcome for event in ended(world)] == ["client_gone"]


async def test_a_burst_spreads_over_the_replicas(make_world):
    world = await make_world({"a": FakeNode(), "b": FakeNode()})
    gate = asyncio.Semaphore(0)
    for node in world.nodes.values():
        node.gate = gate
    replies = [asyncio.create_task(world.client.post(CHAT, json=world.chat())) for _ in range(6)]
    while sum(len(node.bodies) for node in world.nodes.values()) < 6:
        await asyncio.sleep(0)
    assert [len(node.bodies) for node in world.nodes.values()] == [3, 3]
    for _ in range(18):
        gate.release()
    assert {reply.status for reply in await asyncio.gather(*replies)} == {200}
    assert all(node.in_flight == {} for node in world.gateway.fleet.nodes.values())


async def test_a_model_that_is_only_in_the_catalogue_says_how_to_load_it(make_world):
    models = msgspec.convert({"models": [{"id": "cold"}]}, ModelsConfig)
    world = await make_world(models=models)
    reply = await world.client.post(CHAT, json=world.chat("cold"))
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_loaded")
    assert "cortex load cold" in reply.json()["error"]["message"]


@pytest.mark.parametrize("model", ["absent", "cold"])
async def test_what_is_there_is_not_known_before_every_node_has_answered_once(make_world, model):
    late = FakeNode([model])
    late.garbage = b"nonsense"
    models = msgspec.convert({"models": [{"id": "cold"}]}, ModelsConfig)
    world = await make_world({"a": FakeNode(), "b": late}, models=models)
    reply = await world.client.post(CHAT, json=world.chat(model))
    assert (reply.status, reply.json()["error"]["code"]) == (503, "no_capacity")
    assert reply.headers["retry-after"] == "5"
    assert f"'{model}'" in reply.json()["error"]["message"]
    assert "b has not answered yet" in reply.json()["error"]["message"]
    assert (await world.client.get("/v1/models/absent")).status == 503
    late.garbage = None
    await world.poll()
    assert (await world.client.post(CHAT, json=world.chat(model))).status == 200
    world.network.kill("http://b:13131")
    await world.poll()
    assert (await world.client.post(CHAT, json=world.chat("typo"))).status == 404


async def test_a_node_that_stays_away_does_not_make_every_wrong_name_a_want_of_capacity(make_world):
    """But one that the operator has named, or of which nobody at all could be asked, is no wrong name."""
    models = msgspec.convert({"models": [{"id": "cold"}], "aliases": {"nick": "on-b"}}, ModelsConfig)
    nodes = {"a": FakeNode(), "b": FakeNode()}
    for node in nodes.values():
        node.garbage = b"nonsense"
    world = await make_world(nodes, models=models)

    async def asked(model):
        reply = await world.client.post(CHAT, json=world.chat(model))
        return reply.status, reply.json()["error"]["message"]

    world.clock.now += UNREACHED_S
    assert (await asked("typo"))[0] == 503
    nodes["a"].garbage = None
    await world.poll()
    status, message = await asked("typo")
    assert status == 404
    assert "b could not be asked" in message
    assert (await world.client.get("/v1/models/typo")).status == 404
    for name in ("cold", "nick"):
        assert (await asked(name))[0] == (await world.client.get("/v1/models/nick")).status == 503
    world.clock.now -= 1
    assert (await asked("typo"))[0] == 503


async def test_the_times_of_a_stream_are_measured_from_its_arrival(world):
    node = world.nodes["a"]
    node.gate = asyncio.Semaphore(0)
    node.words = ["a", "b", "c"]
    async with world.client.open("POST", CHAT, json=world.chat(stream=True)) as exchange:
        await node.arrived.wait()
        world.clock.now += 2.0
        for _ in node.words:
            node.gate.release()
            await exchange.chunk()
            world.clock.now += 0.5
        node.gate.release()
        async for _ in exchange.chunks():
            pass
    [event] = ended(world)
    assert event.time_to_first_token == pytest.approx(2.0)
    assert event.inter_token_latency == pytest.approx(0.5)
    assert event.tokens_per_second == pytest.approx(2.0)
    assert event.duration == pytest.approx(3.5)
    assert event.overhead == 0.0
    assert [(e.model, e.node) for e in world.recorder.of(RequestStarted)] == [("m", "a")]


async def test_an_error_inside_a_stream_is_passed_on_as_the_dialects_error(world):
    error = msgspec.json.encode({"error": {"message": "out of memory", "code": "internal_error"}})
    world.nodes["a"].garbage = sse.encode(error)
    reply = await world.client.post(CHAT, json=world.chat(stream=True))
    assert reply.status == 502
    assert "out of memory" in reply.json()["error"]["message"]
