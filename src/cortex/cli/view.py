"""Nodes and models of an endpoint, whichever of the two it is: a neuron is shown as a fleet of one.

Asks and orders; prints nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from urllib.parse import quote

import msgspec

from cortex.cli.client import Client, refused
from cortex.cli.failure import Failure
from cortex.wire.chat import peek
from cortex.wire.errors import from_reply
from cortex.wire.node import (
    Discovery,
    Health,
    LoadEvent,
    LoadReply,
    LoadRequest,
    ModelCard,
    ModelReport,
    NodeView,
    UnloadRequest,
    Version,
)


class Listing(msgspec.Struct):
    """An OpenAI list of models."""

    data: list[ModelCard] = []


async def list_models(client: Client) -> list[ModelCard]:
    return (await client.get("/v1/models", Listing)).data


async def list_nodes(client: Client) -> list[NodeView]:
    if not await client.is_neuron():
        return await client.get("/nodes", list[NodeView])
    discovery = await client.get("/discovery", Discovery)
    health = await client.get("/health", Health)
    version = await client.get("/version", Version)
    return [
        NodeView(
            name=discovery.hostname,
            endpoint=client.endpoint,
            up=True,
            version=version.package_version,
            devices=discovery.devices,
            device_health=health.devices,
            models=await client.get("/models", list[ModelReport]),
        )
    ]


class Orders:
    """Loads and unloads on named nodes, through the gateway or straight to the neuron."""

    def __init__(self, client: Client, nodes: Sequence[NodeView], direct: bool) -> None:
        self._client = client
        self._nodes = {node.name: node for node in nodes}
        self._direct = direct

    @classmethod
    async def at(cls, client: Client) -> Orders:
        return cls(client, await list_nodes(client), await client.is_neuron())

    def node_to_load_on(self, name: str | None) -> str:
        """The node that was named, else the only one that is up. Raises Failure."""
        if name is not None:
            return self._named(name)
        up = [node.name for node in self._nodes.values() if node.up]
        if len(up) == 1:
            return up[0]
        if not up:
            raise Failure("no node is up; `cortex status` shows why.")
        raise Failure(f"say which node with --node; these are up: {', '.join(up)}.")

    def nodes_that_hold(self, model_id: str, name: str | None) -> list[str]:
        """The nodes that have the model, or the named one. Raises Failure if none has it."""
        if name is not None:
            return [self._named(name)]
        holders = [
            node.name
            for node in self._nodes.values()
            if any(model.id == model_id and model.status != "unloaded" for model in node.models)
        ]
        if not holders:
            raise Failure(f"no node has {model_id!r} loaded; `cortex status` shows what runs where.")
        return holders

    async def load(self, node: str, request: LoadRequest) -> AsyncGenerator[LoadEvent, None]:
        """Progress, then `loaded`. Raises Failure for an `error` event or a stream that is cut."""
        path = self._path(node, "load")
        async with aclosing(self._client.events(path, request, or_json=True)) as events:
            async for event in events:
                if peek(event.data).error is not None:
                    raise refused(from_reply(500, event.data))
                step = _step(event.data)
                if step is not None:
                    yield step
                    if step.event == "loaded":
                        return
        raise Failure(f"the connection ended before {request.model_id!r} was loaded.")

    async def unload(self, node: str, request: UnloadRequest) -> None:
        await self._client.post(self._path(node, "unload"), request, msgspec.Raw)

    def _named(self, name: str) -> str:
        if name not in self._nodes:
            raise Failure(f"there is no node {name!r}; known: {', '.join(self._nodes) or 'none'}.")
        return name

    def _path(self, node: str, order: str) -> str:
        return f"/models/{order}" if self._direct else f"/nodes/{quote(node, safe='')}/{order}"


def _step(data: bytes) -> LoadEvent | None:
    """What a node says of a load: an event, or the reply of one that knows no events.

    None for anything else: a newer node may say more than we understand.
    """
    try:
        return msgspec.json.decode(data, type=LoadEvent)
    except (msgspec.DecodeError, UnicodeDecodeError):
        pass
    try:
        reply = msgspec.json.decode(data, type=LoadReply)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    return LoadEvent(event="loaded", model=reply.model) if reply.status == "loaded" else None
