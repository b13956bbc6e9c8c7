"""The commands at a real gateway with a fake node behind it: both sides mean the same by their words."""

from __future__ import annotations

import json

import pytest

from cortex.config import GatewayConfig, ModelsConfig, ModelSection, NeuronSection
from cortex.gateway.app import build_gateway
from cortex.testing import FakeNode, memory_connect
from cortex.web.pool import Pool

GATEWAY = "http://gateway.test:31313"
NODE = "http://node.test:13131"


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> FakeNode:
    """The node behind the gateway that every command asks; each command sees a freshly started gateway."""
    fake = FakeNode(["m"])
    config = GatewayConfig(neurons=(NeuronSection(name="a", endpoint=NODE),))
    models = ModelsConfig(models=(ModelSection(id="cold"),), aliases={"nick": "m"})

    class StartedPool(Pool):
        """The client's pool; the gateway lives and ends with it, in the same loop."""

        async def aclose(self) -> None:
            await super().aclose()
            await gateway.stop()
            await network.aclose()

    async def started() -> Pool:
        nonlocal gateway, network
        network = memory_connect({NODE: fake.app})
        gateway = build_gateway(config, models, connect=network)
        await gateway.start()
        return StartedPool(connect=memory_connect({GATEWAY: gateway.app}))

    gateway = network = None
    monkeypatch.setattr("cortex.cli.client.make_pool", started)
    monkeypatch.setattr("cortex.cli.chat.make_pool", started)
    monkeypatch.setenv("CORTEX_ENDPOINT", GATEWAY)
    return fake


def test_models_are_listed_with_their_place_and_context(node, cortex) -> None:
    lines = [" ".join(line.split()) for line in cortex("models").stdout.splitlines()]
    assert lines[1:] == ["cold no - -", "m yes a 4096", "nick (alias of m) yes a 4096"]


def test_the_status_shows_the_node_and_its_models(node, cortex) -> None:
    [view] = json.loads(cortex("status", "--json").stdout)
    assert (view["name"], view["up"], [model["id"] for model in view["models"]]) == ("a", True, ["m"])


def test_a_load_and_an_unload_reach_the_node(node, cortex) -> None:
    assert cortex("load", "new", "--hold-s", "3").stdout == "new is loaded on a\n"
    assert cortex("unload", "m").stdout == "m is unloaded from a\n"
    assert [path for path, _ in node.orders] == ["/models/load", "/models/unload"]
    assert json.loads(node.orders[0][1])["hold_s"] == 3


def test_a_chat_goes_through(node, cortex) -> None:
    assert cortex("chat", "nick", "-m", "Hi").stdout == "Hello\n"
    assert json.loads(node.bodies[0])["model"] == "m"


def test_a_stream_that_the_node_breaks_is_one_line(node, cortex) -> None:
    node.break_after = 1
    result = cortex("chat", "m", "-m", "Hi")
    assert (result.exit_code, result.stdout) == (1, "Hel\n")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_an_unknown_model_is_one_line(node, cortex) -> None:
    result = cortex("chat", "nope", "-m", "Hi")
    assert (result.exit_code, result.stdout.strip()) == (1, "")
    assert "nope" in result.stderr
    assert result.stderr.count("\n") == 1
