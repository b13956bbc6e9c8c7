from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from cortex import __version__
from cortex.testing.clock import settle
from cortex.wire.errors import LoadFailed
from cortex.wire.node import Discovery, Health, LoadEvent, ModelReport, Version
from cortex.wire.sse import Decoder

SSE = {"accept": "text/event-stream"}


def events_of(body: bytes) -> list[LoadEvent]:
    return [msgspec.json.decode(event.data, type=LoadEvent) for event in Decoder().feed(body) if event.data]


# --- what the node is ---


async def test_version_names_the_build(node: Any) -> None:
    version = msgspec.json.decode((await node.client.get("/version")).body, type=Version)
    assert version.package_version == __version__
    assert version.wire_version == 1
    assert version.python_version


async def test_discovery_lists_devices_and_engines(node: Any) -> None:
    found = msgspec.json.decode((await node.client.get("/discovery")).body, type=Discovery)
    assert [(d.uuid, d.name, d.kind, d.cores, d.vram_total_mb) for d in found.devices] == [
        ("cpu", "Test CPU", "cpu", 2, 4096)
    ]
    assert found.harnesses == ["scripted"]
    assert found.max_prompt_tokens == 0
    await node.load()
    assert (await node.client.get("/discovery")).json()["max_prompt_tokens"] == 4096


async def test_health_shows_devices_ledger_and_load(node: Any) -> None:
    await node.load(memory_mb=100)
    await node.clock.advance(7)
    for _ in range(100):
        health = msgspec.json.decode((await node.client.get("/health")).body, type=Health)
        if health.devices[0].vram_free_mb:
            break
        await asyncio.sleep(0.01)
    (device,) = health.devices
    assert health.uptime_secs == 7.0
    assert (device.budget_bytes, device.granted_bytes) == (3072 * 2**20, 100 * 2**20)
    assert (device.vram_total_mb, device.vram_free_mb) == (4096, 4096)
    assert [(grant.model_id, grant.device, grant.bytes) for grant in health.ledger] == [
        ("m", "cpu", 100 * 2**20)
    ]
    assert [(load.id, load.max_in_flight, load.max_queue_depth) for load in health.models] == [("m", 8, 32)]
    assert health.failed == []


# --- models ---


async def test_a_model_is_loaded_listed_and_unloaded(node: Any) -> None:
    reply = await node.client.post("/models/load", json={"model_id": "m"})
    assert (reply.status, reply.json()["status"], reply.json()["model"]["id"]) == (200, "loaded", "m")
    (report,) = msgspec.json.decode((await node.client.get("/models")).body, type=list[ModelReport])
    assert (report.status, report.harness, report.devices) == ("loaded", "scripted", ["cpu"])
    assert report.servable.ok
    cards = (await node.client.get("/v1/models")).json()
    assert cards["object"] == "list"
    assert [(card["id"], card["loaded"], card["object"]) for card in cards["data"]] == [("m", True, "model")]
    reply = await node.client.post("/models/unload", json={"model_id": "m"})
    assert (reply.status, reply.json()["status"]) == (200, "unloaded")
    assert [report["status"] for report in (await node.client.get("/models")).json()] == ["unloaded"]
    assert (await node.client.get("/v1/models")).json()["data"] == []
    assert not node.factory.live


@pytest.mark.parametrize("path", ["/models/org/name", "/models/org%2Fname"])
async def test_an_id_may_hold_slashes(node: Any, path: str) -> None:
    await node.load("org/name")
    reply = await node.client.get(path + "/endpoint", headers={"host": "beast:13131"})
    assert reply.json() == {"url": "http://beast:13131"}
    assert (await node.client.get(path + "/capabilities")).json() == {"capabilities": ["text"]}


async def test_what_is_not_loaded_has_no_endpoint(node: Any) -> None:
    assert (await node.client.get("/models/m/endpoint")).status == 404
    assert (await node.client.get("/models/m/capabilities")).status == 404
    await node.load()
    await node.client.post("/models/unload", json={"model_id": "m"})
    assert (await node.client.get("/models/m/endpoint")).status == 404


async def test_listing_answers_while_a_model_loads(node: Any) -> None:
    gate = node.hold_loads()
    loading = asyncio.create_task(node.client.post("/models/load", json={"model_id": "m"}))
    while not node.factory.loading:
        await asyncio.sleep(0)
    (report,) = (await node.client.get("/models")).json()
    assert (report["status"], report["servable"]["ok"]) == ("loading", False)
    assert report["progress"]["phase"] == "weights"
    assert (await node.client.get("/health")).status == 200
    gate.set()
    assert (await loading).status == 200


async def test_progress_comes_as_events(node: Any) -> None:
    gate = node.hold_loads()
    async with node.client.open("POST", "/models/load", json={"model_id": "m"}, headers=SSE) as exchange:
        (first,) = events_of(await exchange.chunk())
        assert first.event == "progress"
        assert first.progress is not None
        assert (first.progress.done, first.progress.total) == (0, 64 * 2**20)
        gate.set()
        rest = events_of((await exchange.reply()).body)
    assert [event.event for event in rest] == ["progress", "loaded"]
    assert rest[-1].model is not None
    assert rest[-1].model.status == "loaded"


async def test_a_load_that_fails_midway_ends_in_an_error_event(node: Any) -> None:
    node.factory.refusal = LoadFailed("The file is damaged.")
    gate = node.hold_loads()
    async with node.client.open("POST", "/models/load", json={"model_id": "m"}, headers=SSE) as exchange:
        await exchange.chunk()
        gate.set()
        last = events_of((await exchange.reply()).body)[-1]
    assert last.event == "error"
    assert last.error is not None
    assert (last.error["message"], last.error["code"]) == ("The file is damaged.", "load_failed")


@pytest.mark.parametrize("headers", [{}, SSE])
async def test_no_room_is_409_with_the_ledger(node: Any, headers: dict[str, str]) -> None:
    await node.load("n", memory_mb=2000)
    reply = await node.client.post("/models/load", json={"model_id": "m", "memory_mb": 2000}, headers=headers)
    assert reply.status == 409
    (row,) = reply.json()["error"]["ledger"]
    assert (row["device"], row["budget_bytes"], row["asked_bytes"]) == ("cpu", 3072 * 2**20, 2000 * 2**20)
    assert row["granted"] == [{"model_id": "n", "bytes": 2000 * 2**20}]
    assert [report["id"] for report in (await node.client.get("/models")).json()] == ["n"]


async def test_a_client_that_leaves_a_load_ends_it(node: Any) -> None:
    node.hold_loads()
    for headers in ({}, SSE):
        async with node.client.open("POST", "/models/load", json={"model_id": "m"}, headers=headers):
            while not node.factory.loading:
                await asyncio.sleep(0)
        await settle()
    assert node.factory.cancelled_loads == ["m", "m"]
    assert (await node.client.get("/health")).json()["ledger"] == []


async def test_conflicts_of_unloading_have_their_codes(node: Any) -> None:
    await node.load(hold_s=30)
    reply = await node.client.post("/models/unload", json={"model_id": "m"})
    assert (reply.status, reply.json()["error"]["code"]) == (409, "held")
    assert reply.headers["retry-after"] == "30"
    reply = await node.client.post("/models/unload", json={"model_id": "absent"})
    assert (reply.status, reply.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/models/load", b"{", None, "not valid JSON"),
        ("/models/load", b"[]", None, "object"),
        ("/models/load", b"{}", "model_id", "model_id"),
        ("/models/load", b'{"model_id": ""}', "model_id", "must name a model"),
        ("/models/load", b'{"model_id": 7}', "model_id", "Expected `str`"),
        ("/models/load", b'{"model_id": "m", "memory_mb": "much"}', "memory_mb", "Expected `int"),
        ("/models/load", b'{"model_id": "m", "memory_mb": 0}', "memory_mb", "at least 1"),
        ("/models/load", b'{"model_id": "m", "tensor_parallel": 0}', "tensor_parallel", "at least 1"),
        ("/models/load", b'{"model_id": "m", "hold_s": -1}', "hold_s", "seconds"),
        ("/models/load", b'{"model_id": "m", "hold_s": 1e300}', "hold_s", "86400 at most"),
        ("/models/load", b'{"model_id": "m", "devices": ["GPU-7"]}', "devices", "no device 'GPU-7'"),
        ("/models/load", b'{"model_id": "m", "harness": "candle"}', "harness", "no engine 'candle'"),
        ("/models/load", b'{"model_id": "m", "quant": ""}', "quant", "leave it out"),
        ("/models/load", b'{"model_id": "m", "source": ""}', "source", "leave it out"),
        ("/models/load", b'{"model_id": "../m"}', "source", "no path under models_dir"),
        ("/models/load", b'{"model_id": "\xff"}', None, "JSON"),
        ("/models/unload", b'{"model_id": "m", "if_idle": 1}', "if_idle", "Expected `bool`"),
    ],
)
async def test_bad_orders_name_the_field(
    node: Any, path: str, body: bytes, param: str | None, words: str
) -> None:
    reply = await node.client.post(path, body=body)
    error = reply.json()["error"]
    assert (reply.status, error["param"]) == (400, param)
    assert words in error["message"]
    assert (await node.client.get("/models")).json() == []
