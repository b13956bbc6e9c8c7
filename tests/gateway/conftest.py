"""A whole gateway in process: real routes, pool and h11 client, with fake nodes behind the connect seam."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from cortex import hookimpl
from cortex.config import GatewayConfig, GatewaySection, KeySection, ModelsConfig, NeuronSection
from cortex.gateway.app import Gateway, build_gateway
from cortex.hookspecs import ObserverEvent
from cortex.plugins import load_gateway_plugins
from cortex.testing import AsgiClient, FakeNode, ManualClock, MemoryNetwork


class Recorder:
    name = "recorder"

    def __init__(self) -> None:
        self.events: list[ObserverEvent] = []

    @hookimpl
    def cortex_register_observers(self, register: Callable[[Any], None]) -> None:
        register(self)

    def on_event(self, event: ObserverEvent) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class World:
    """The gateway under test and everything around it."""

    def __init__(self, nodes: dict[str, FakeNode], models: ModelsConfig, config: dict[str, Any]) -> None:
        self.nodes = nodes
        self.clock = ManualClock()
        self.recorder = Recorder()
        self.network = MemoryNetwork({f"http://{name}:13131": node.app for name, node in nodes.items()})
        keys = tuple(KeySection(**key) for key in config.pop("keys", ()))
        self.gateway: Gateway = build_gateway(
            GatewayConfig(
                gateway=GatewaySection(**config),
                keys=keys,
                neurons=tuple(
                    NeuronSection(name=name, endpoint=f"http://{name}:13131", node_token=f"token-{name}")
                    for name in nodes
                ),
            ),
            models,
            plugins=load_gateway_plugins([self.recorder], found=()),
            connect=self.network,
            clock=self.clock,
            call_later=self.clock.call_later,
        )
        self.client = AsgiClient(self.gateway.app)

    async def poll(self) -> None:
        for node in self.gateway.fleet.nodes.values():
            await self.gateway.poller.poll(node)

    async def metrics(self) -> str:
        return (await AsgiClient(self.gateway.metrics_app).get("/metrics")).body.decode()

    def chat(self, model: str = "m", **fields: Any) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": "hi"}], **fields}


MakeWorld = Callable[..., Awaitable[World]]


@pytest.fixture
async def make_world() -> AsyncIterator[MakeWorld]:
    worlds: list[World] = []

    async def make(
        nodes: dict[str, FakeNode] | None = None, models: ModelsConfig | None = None, **config: Any
    ) -> World:
        world = World({"a": FakeNode()} if nodes is None else nodes, models or ModelsConfig(), config)
        worlds.append(world)
        await world.poll()
        return world

    yield make
    for world in worlds:
        await world.gateway.stop()
        await world.network.aclose()


@pytest.fixture
async def world(make_world: MakeWorld) -> World:
    return await make_world()
