"""`cortex status` and `cortex models`, at a gateway and at a neuron."""

import json
from typing import Any

import pytest

from cortex.wire.errors import Unauthorized

GPU = {"index": 0, "uuid": "GPU-1", "name": "RTX 4090", "vram_total_mb": 24564}
GPU_NOW = {"index": 0, "vram_used_mb": 12282, "utilization_pct": 41.6, "temp_c": 63.0}
QWEN = {
    "id": "qwen",
    "status": "loaded",
    "devices": ["GPU-1"],
    "vram_used_mb": 900,
    "in_flight": 2,
    "limit": {"context": 32768},
}
BEAST = {
    "name": "beast",
    "endpoint": "http://beast:13131",
    "up": True,
    "version": "0.1.0",
    "devices": [GPU],
    "device_health": [GPU_NOW],
    "models": [QWEN],
}
BENJY = {"name": "benjy", "endpoint": "http://benjy:13131", "up": False, "detail": "Connection refused"}


def rows(text: str) -> list[str]:
    """The lines with single spaces."""
    return [" ".join(line.split()) for line in text.splitlines()]


def test_status_shows_devices_and_models_of_every_node(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", [BEAST, BENJY])
    result = cortex("status")
    assert result.exit_code == 0, result.stderr
    table = rows(result.stdout)
    assert "beast up 0.1.0 RTX 4090 12.0 GiB 24.0 GiB 42 % 63 °C" in table
    assert "benjy down: Connection refused - - - - - -" in table
    assert "qwen beast loaded GPU-1 900 MiB 2 32768" in table


def test_status_as_json_is_what_the_gateway_says(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", [BEAST, BENJY])
    nodes = json.loads(cortex("status", "--json").stdout)
    assert [node["name"] for node in nodes] == ["beast", "benjy"]
    assert nodes[0]["models"][0]["limit"]["context"] == 32768
    assert nodes[1]["detail"] == "Connection refused"


def test_status_of_a_fleet_without_nodes_says_what_to_add(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", [])
    assert "[[neurons]]" in cortex("status").stdout


def test_status_of_a_neuron_shows_it_as_a_fleet_of_one(endpoint, cortex) -> None:
    endpoint.on("GET", "/discovery", {"hostname": "bob", "os": "Linux", "devices": [GPU]})
    endpoint.on("GET", "/health", {"devices": [GPU_NOW]})
    endpoint.on("GET", "/version", {"package_version": "0.2.0"})
    endpoint.on("GET", "/models", [QWEN])
    table = rows(cortex("status").stdout)
    assert "bob up 0.2.0 RTX 4090 12.0 GiB 24.0 GiB 42 % 63 °C" in table
    assert "qwen bob loaded GPU-1 900 MiB 2 32768" in table


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ({"status": "loading", "progress": {"phase": "reading", "done": 1, "total": 4}}, "loading (25 %)"),
        ({"status": "failed", "servable": {"ok": False, "detail": "out of memory"}}, "failed: out of memory"),
    ],
)
def test_status_says_how_far_or_why_not(endpoint, cortex, model: dict[str, Any], shown: str) -> None:
    endpoint.on("GET", "/nodes", [{**BEAST, "models": [{"id": "m", **model}]}])
    assert shown in cortex("status").stdout


CARDS = {
    "object": "list",
    "data": [
        {
            "id": "qwen",
            "loaded": True,
            "locations": [{"node": "beast", "status": "loaded"}, {"node": "benjy", "status": "unreachable"}],
            "limit": {"context": 32768},
        },
        {"id": "fast", "loaded": True, "alias_of": "qwen", "locations": []},
        {"id": "cold"},
    ],
}


def test_models_lists_id_loaded_where_and_context(endpoint, cortex) -> None:
    endpoint.on("GET", "/v1/models", CARDS)
    table = rows(cortex("models").stdout)
    assert table[0] == "ID LOADED WHERE CONTEXT"
    assert table[1:] == [
        "qwen yes beast, benjy (unreachable) 32768",
        "fast (alias of qwen) yes - -",
        "cold no - -",
    ]


def test_models_as_json_has_every_field_of_every_model(endpoint, cortex) -> None:
    endpoint.on("GET", "/v1/models", CARDS)
    cards = json.loads(cortex("models", "--json").stdout)
    assert cards[2] | {"limit": None} == cards[2]
    assert (cards[2]["loaded"], cards[2]["locations"]) == (False, [])
    assert cards[0]["limit"] == {"context": 32768, "input": 0, "output": 0}


def test_no_models_is_said_and_not_an_empty_table(endpoint, cortex) -> None:
    endpoint.on("GET", "/v1/models", {"data": []})
    assert "cortex load" in cortex("models").stdout


def test_the_key_goes_along(endpoint, cortex, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CORTEX_API_KEY", "sk-1")
    endpoint.on("GET", "/v1/models", CARDS)
    cortex("models")
    cortex("models", "--key", "sk-2")
    assert [headers["authorization"] for headers in endpoint.headers] == ["Bearer sk-1", "Bearer sk-2"]


def test_a_refusal_is_one_line(endpoint, cortex) -> None:
    endpoint.on("GET", "/v1/models", Unauthorized("A key is needed."))
    result = cortex("models")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: A key is needed. Keys go into CORTEX_API_KEY.\n"


def test_an_endpoint_that_is_something_else_is_one_line(endpoint, cortex) -> None:
    endpoint.on("GET", "/v1/models", b"<html>hello</html>")
    result = cortex("models")
    assert result.exit_code == 1
    assert result.stderr.startswith(
        "error: http://fleet.test:31313 answered GET /v1/models with something else"
    )
    assert result.stderr.count("\n") == 1
