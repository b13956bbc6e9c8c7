"""Asks every node how it is, each in a task of its own, so that a slow node delays nobody.

Writes what it hears into the fleet; decides nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from cortex.gateway.fleet import MISSES_UNTIL_LOST, Fleet, Node
from cortex.gateway.node import POLL_TIMEOUT_S
from cortex.gateway.observe import Observers
from cortex.hookspecs import NodePolled
from cortex.wire.errors import CortexError
from cortex.wire.node import Health

log: Final = logging.getLogger("cortex.poller")


class Poller:
    def __init__(
        self,
        fleet: Fleet,
        observers: Observers,
        *,
        interval: float,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        first_look: float = 1.0,
    ) -> None:
        self._fleet = fleet
        self._observers = observers
        self._interval = interval
        self._sleep = sleep
        self._first_look = first_look
        self._tasks: list[asyncio.Task[None]] = []
        self._looks = {name: asyncio.Lock() for name in fleet.nodes}
        self._wanted = {name: asyncio.Event() for name in fleet.nodes}

    async def start(self) -> None:
        """Polls in the background; returns once every node was looked at, or after `first_look` seconds."""
        first = [asyncio.Event() for _ in self._fleet.nodes]
        self._tasks = [
            asyncio.create_task(self._keep_polling(node, looked))
            for node, looked in zip(self._fleet.nodes.values(), first, strict=True)
        ]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._first_look):
                for looked in first:
                    await looked.wait()

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    async def _keep_polling(self, node: Node, looked: asyncio.Event) -> None:
        while True:
            try:
                await self.poll(node)
            except Exception:  # a fault of ours must not end the polling of a node
                log.exception("poll failed node=%s", node.name)
            looked.set()
            await self._rest(node)

    async def _rest(self, node: Node) -> None:
        """Until the next look is due or wanted."""
        wanted = self._wanted[node.name]
        due = asyncio.ensure_future(self._sleep(self._interval))
        asked = asyncio.ensure_future(wanted.wait())
        try:
            await asyncio.wait({due, asked}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            due.cancel()
            asked.cancel()
        wanted.clear()

    def look_soon(self, node: Node) -> None:
        """The node is otherwise than it was last seen: do not wait for the next look that is due."""
        self._wanted[node.name].set()

    async def poll(self, node: Node) -> None:
        """One look at one node: models decide whether it is up; health and discovery may be missing.

        Looks at the same node follow each other, so that the newest one says how it is.
        """
        async with self._looks[node.name]:
            await self._poll(node)

    async def _poll(self, node: Node) -> None:
        known = node.detail
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                models = await node.client.models()
        except (CortexError, TimeoutError) as error:
            detail = str(error) or f"no answer within {POLL_TIMEOUT_S:g} s"
            if self._fleet.missed(node, detail):
                log.warning("node lost node=%s misses=%d detail=%r", node.name, node.misses, detail)
                node.client.abort(f"node {node.name} missed {MISSES_UNTIL_LOST} polls: {detail}")
            elif node.detail != known:
                log.warning("node away node=%s detail=%r", node.name, detail)
        else:
            if self._fleet.saw_models(node, models):
                log.info("node up node=%s models=%d", node.name, len(models))
                node.discovery = None  # it may have come back as another machine
            await self._look_closer(node)
        self._observers.emit(_polled(node))

    async def _look_closer(self, node: Node) -> None:
        try:
            async with asyncio.timeout(POLL_TIMEOUT_S):
                node.saw_health(await node.client.health())
                if node.discovery is None:
                    node.version = await node.client.version()
                    node.discovery = await node.client.discovery()
        except (CortexError, TimeoutError) as error:
            log.info("no health node=%s detail=%r", node.name, str(error))


def _polled(node: Node) -> NodePolled:
    return NodePolled(
        node=node.name,
        up=node.up,
        states={report.id: report.status for report in node.models.values()} if node.up else {},
        devices=_devices(node.health) if node.up and node.health else (),
    )


def _devices(health: Health) -> list[dict[str, float]]:
    devices = []
    for device in health.devices:
        readings = {
            "index": float(device.index),
            "memory_used_bytes": device.vram_used_mb * 2.0**20,
            "memory_total_bytes": device.vram_total_mb * 2.0**20,
        }
        if device.utilization_pct is not None:
            readings["utilization_ratio"] = device.utilization_pct / 100
        if device.temp_c is not None:
            readings["temperature_celsius"] = device.temp_c
        devices.append(readings)
    return devices
