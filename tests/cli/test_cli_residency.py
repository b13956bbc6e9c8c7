"""`cortex load` and `cortex unload`: the order that goes out, the progress and the outcome."""

import json

import pytest

from cortex.wire.errors import Conflict

ONE = [{"name": "beast", "endpoint": "http://beast:13131", "up": True, "models": []}]
TWO = [
    {"name": "beast", "endpoint": "x", "up": True, "models": [{"id": "qwen"}]},
    {"name": "benjy", "endpoint": "x", "up": True, "models": [{"id": "qwen"}, {"id": "other"}]},
]
PROGRESS = {"event": "progress", "progress": {"phase": "reading", "done": 50, "total": 100}}
LOADED = {"event": "loaded", "model": {"id": "qwen", "load_seconds": 1.26, "vram_used_mb": 600}}


def orders(endpoint) -> list:
    return [(path, body) for method, path, body in endpoint.asked if method == "POST"]


def test_load_shows_progress_and_then_where_how_long_and_how_much(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", ONE).stream("/nodes/beast/load", PROGRESS, LOADED)
    result = cortex("load", "qwen")
    assert result.exit_code == 0
    assert result.stderr == "reading: 50 %, 0.1 kB of 0.1 kB\n"
    assert result.stdout == "qwen is loaded on beast in 1.3 s, 600 MiB\n"


def test_load_passes_on_what_was_asked_for(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", TWO).stream("/nodes/benjy/load", LOADED)
    options = [
        "--node",
        "benjy",
        "--source",
        "pypi:x==1",
        "--memory-mb",
        "700",
        "--dtype",
        "float32",
        "--quant",
        "q4_k_m",
        "--tensor-parallel",
        "2",
        "--hold-s",
        "1.5",
    ]
    assert cortex("load", "qwen", *options).exit_code == 0
    [(path, body)] = orders(endpoint)
    assert path == "/nodes/benjy/load"
    assert {name: value for name, value in body.items() if value is not None} == {
        "model_id": "qwen",
        "source": "pypi:x==1",
        "memory_mb": 700,
        "dtype": "float32",
        "quant": "q4_k_m",
        "tensor_parallel": 2,
        "hold_s": 1.5,
    }


def test_load_as_json_is_the_report(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", ONE).stream("/nodes/beast/load", LOADED)
    assert json.loads(cortex("load", "qwen", "--json").stdout)["load_seconds"] == 1.26


def test_load_at_a_neuron_goes_straight_to_it(endpoint, cortex) -> None:
    endpoint.on("GET", "/discovery", {"hostname": "bob", "os": "Linux"})
    for path, answer in (("/health", {}), ("/version", {"package_version": "1"}), ("/models", [])):
        endpoint.on("GET", path, answer)
    endpoint.stream("/models/load", LOADED)
    assert cortex("load", "qwen").stdout.startswith("qwen is loaded on bob")


@pytest.mark.parametrize(
    ("nodes", "args", "complaint"),
    [
        (TWO, [], "say which node with --node; these are up: beast, benjy."),
        ([{**ONE[0], "up": False}], [], "no node is up; `cortex status` shows why."),
        (ONE, ["--node", "bob"], "there is no node 'bob'; known: beast."),
    ],
)
def test_load_without_a_clear_place_is_one_line(endpoint, cortex, nodes, args, complaint) -> None:
    endpoint.on("GET", "/nodes", nodes)
    result = cortex("load", "qwen", *args)
    assert (result.exit_code, result.stderr) == (1, f"error: {complaint}\n")
    assert orders(endpoint) == []


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([{"event": "error", "error": {"message": "No room.", "code": "no_room"}}], "No room."),
        ([{"error": {"message": "The node is gone.", "code": "node_lost"}}], "The node is gone."),
        ([PROGRESS], "the connection ended before 'qwen' was loaded."),
        ([PROGRESS, Conflict("Cut.")], "Cut."),
    ],
)
def test_a_load_that_fails_on_the_way_is_one_line(endpoint, cortex, events, complaint) -> None:
    endpoint.on("GET", "/nodes", ONE).stream("/nodes/beast/load", *events)
    result = cortex("load", "qwen")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == f"error: {complaint}"


def test_a_load_that_is_refused_is_one_line(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", ONE).on("POST", "/nodes/beast/load", Conflict("The ledger is full."))
    result = cortex("load", "qwen")
    assert (result.exit_code, result.stderr) == (1, "error: The ledger is full.\n")


def test_events_of_a_newer_node_are_passed_over(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", ONE).stream(
        "/nodes/beast/load", {"event": "warmed"}, b"data: what\n\n", LOADED
    )
    assert cortex("load", "qwen").exit_code == 0


def test_unload_goes_to_every_node_that_has_the_model(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", TWO)
    for node in ("beast", "benjy"):
        endpoint.on("POST", f"/nodes/{node}/unload", {})
    result = cortex("unload", "qwen", "--if-idle")
    assert result.stdout == "qwen is unloaded from beast, benjy\n"
    body = {"model_id": "qwen", "if_idle": True}
    assert orders(endpoint) == [("/nodes/beast/unload", body), ("/nodes/benjy/unload", body)]


def test_unload_of_a_named_node_leaves_the_others(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", TWO).on("POST", "/nodes/benjy/unload", {})
    result = cortex("unload", "qwen", "--node", "benjy", "--json")
    assert json.loads(result.stdout) == {"model": "qwen", "nodes": ["benjy"]}
    assert [path for path, _ in orders(endpoint)] == ["/nodes/benjy/unload"]


def test_unload_of_what_nobody_has_is_one_line(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", TWO)
    result = cortex("unload", "nope")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: no node has 'nope' loaded")


def test_unload_of_a_busy_model_says_so(endpoint, cortex) -> None:
    endpoint.on("GET", "/nodes", TWO).on("POST", "/nodes/benjy/unload", Conflict("It is busy."))
    assert cortex("unload", "other").stderr == "error: It is busy.\n"
