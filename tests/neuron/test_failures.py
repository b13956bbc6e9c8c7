"""A model that fails: its requests are told, others notice nothing, and it comes back with a growing rest."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec

from cortex.testing.clock import settle
from cortex.testing.scripted import ScriptedEngine
from cortex.wire.errors import LoadFailed
from cortex.wire.node import FailedModel, Health


async def health(node: Any) -> Health:
    return msgspec.json.decode((await node.client.get("/health")).body, type=Health)


def held(engine: ScriptedEngine) -> asyncio.Event:
    """Every step of the engine waits until the event is set."""
    gate = asyncio.Event()
    engine.before_step = lambda request_id, step: gate.wait()
    return gate


async def test_a_death_fails_the_requests_in_it_and_no_others(node: Any) -> None:
    dying, sound = await node.load("m"), await node.load("n")
    held(dying)
    gate = held(sound)
    doomed = [asyncio.create_task(node.chat("m", stream=stream)) for stream in (True, False, True)]
    unharmed = [asyncio.create_task(node.chat("n", stream=stream)) for stream in (True, False)]
    await dying.until(lambda: len(dying.waiting) == 3)
    await sound.until(lambda: len(sound.waiting) == 2)
    dying.kill("ran out of memory")
    for task in doomed:
        reply = await task
        assert reply.status == 500
        assert "ran out of memory" in reply.json()["error"]["message"]
    gate.set()
    assert [(await task).status for task in unharmed] == [200, 200]
    assert node.engines["n"] is sound
    await node.nothing_left()


async def test_health_says_which_models_have_failed_and_why(node: Any) -> None:
    engine = await node.load("m")
    await node.load("n")
    engine.kill("gave logits that are not finite")
    await settle()
    found = await health(node)
    assert [load.id for load in found.models] == ["n"]
    assert found.failed == [FailedModel(id="m", detail="Its engine gave logits that are not finite.")]
    assert [grant.model_id for grant in found.ledger] == ["n"], "its memory is back"
    reports = {report["id"]: report for report in (await node.client.get("/models")).json()}
    assert (reports["m"]["status"], reports["m"]["servable"]["detail"]) == ("failed", found.failed[0].detail)
    assert (await node.chat("m")).status == 200
    assert (await health(node)).failed == []


async def test_a_load_that_fails_is_in_health_until_it_is_forgotten(node: Any) -> None:
    node.factory.refusal = LoadFailed("The file is damaged.")
    assert (await node.client.post("/models/load", json={"model_id": "m"})).status == 503
    (failed,) = (await health(node)).failed
    assert (failed.id, failed.detail, failed.retry_in_s) == ("m", "The file is damaged.", 1)
    await node.client.post("/models/unload", json={"model_id": "m"})
    assert (await health(node)).failed == []


async def test_a_model_that_dies_on_each_request_rests_longer_and_recovers(node: Any) -> None:
    await node.load()

    async def die(request_id: str, step: int) -> None:
        node.engines["m"].kill("was killed by SIGSEGV")

    async def ask_in_vain() -> None:
        reply = await node.chat()
        assert reply.status == 500
        assert "SIGSEGV" in reply.json()["error"]["message"]
        await settle()

    def make_mortal(order: object) -> ScriptedEngine:
        engine = node.engines["m"] = ScriptedEngine()
        engine.before_step = die
        return engine

    node.engines["m"].before_step = die
    node.factory.make_engine = make_mortal
    await ask_in_vain()  # the first death is forgiven at once
    for rest in (2, 4, 8, 16, 32, 60, 60):
        await ask_in_vain()
        loads = len(node.factory.models)
        assert [failed.retry_in_s for failed in (await health(node)).failed] == [rest]
        reply = await node.chat(stream=True)
        assert (reply.status, reply.json()["error"]["code"]) == (503, "load_failed")
        assert reply.headers["retry-after"] == str(rest)
        assert "SIGSEGV" in reply.json()["error"]["message"]
        assert len(node.factory.models) == loads, "a rest is a rest"
        await node.clock.advance(rest)
    node.factory.make_engine = lambda order: ScriptedEngine()
    assert (await node.chat()).status == 200
    assert (await health(node)).failed == []
    await node.nothing_left()
    assert await node.sample('neuron_refusals_total{reason="load_failed"}') == "7"


async def test_requests_that_come_while_it_returns_share_one_load(node: Any) -> None:
    engine = await node.load()
    engine.kill("was killed by SIGKILL")
    await settle()
    gate = node.hold_loads()
    asked = [asyncio.create_task(node.chat()) for _ in range(4)]
    while not node.factory.loading:
        await asyncio.sleep(0)
    await settle()
    assert (await health(node)).failed == []
    gate.set()
    assert [(await task).status for task in asked] == [200] * 4
    assert len(node.factory.models) == 2
