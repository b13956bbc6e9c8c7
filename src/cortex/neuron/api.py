"""The node's own routes: what it is, how it does, and which models it holds.

Everything here answers from memory, whatever the devices are doing; only a load or an unload waits.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import socket
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final, TypeVar

import msgspec

from cortex import __version__
from cortex.neuron.activation import Activator
from cortex.neuron.chat_api import ChatApi
from cortex.neuron.hardware import Hardware
from cortex.neuron.memory import MIB, Ledger
from cortex.neuron.metrics import NeuronMetrics
from cortex.neuron.monitor import Monitor
from cortex.neuron.residents import Residents
from cortex.web.asgi import EventStream, Request, Response, json_response
from cortex.web.service import Route
from cortex.wire import sse
from cortex.wire.chat import unreadable
from cortex.wire.errors import BadRequest, CortexError, UnknownModel, to_object
from cortex.wire.node import (
    MOST_HOLD_S,
    Device,
    DeviceHealth,
    Discovery,
    Health,
    LoadEvent,
    LoadReply,
    LoadRequest,
    ModelCard,
    ModelReport,
    Progress,
    UnloadRequest,
    Version,
    Wire,
)

W = TypeVar("W", bound=Wire)


class NodeApi:
    def __init__(
        self,
        *,
        residents: Residents,
        chat: ChatApi,
        hardware: Hardware,
        monitor: Monitor,
        ledger: Ledger,
        activator: Activator,
        metrics: NeuronMetrics,
        harnesses: Sequence[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._residents = residents
        self._chat = chat
        self._hardware = hardware
        self._monitor = monitor
        self._ledger = ledger
        self._activator = activator
        self._metrics = metrics
        self._harnesses = list(harnesses)
        self._clock = clock
        self._started = clock()
        self._version = _version()

    def routes(self) -> list[Route]:
        return [
            Route("GET", "/version", self.version, routine=True),
            Route("GET", "/discovery", self.discovery, routine=True),
            Route("GET", "/health", self.health, routine=True),
            Route("GET", "/metrics", self.metrics, routine=True),
            Route("GET", "/models", self.models, routine=True),
            Route("POST", "/models/load", self.load),
            Route("POST", "/models/unload", self.unload),
            Route("GET", "/models/{id:path}/endpoint", self.endpoint),
            Route("GET", "/models/{id:path}/capabilities", self.capabilities),
            Route("GET", "/v1/models", self.cards),
            Route("POST", "/v1/chat/completions", self._chat.handle),
        ]

    # --- what it is, how it does ---

    async def version(self, request: Request) -> Response:
        return json_response(self._version)

    async def discovery(self, request: Request) -> Response:
        cuda = self._hardware.cuda
        limits = [report.limit.input for report in self._residents.reports() if report.limit]
        return json_response(
            Discovery(
                hostname=socket.gethostname(),
                os=platform.system(),
                kernel=platform.release(),
                cuda_version=cuda.cuda_version,
                driver_version=cuda.driver_version,
                devices=list(self._hardware.devices),
                harnesses=self._harnesses,
                cuda_unavailable_reason=cuda.reason,
                max_prompt_tokens=max(limits, default=0),
            )
        )

    async def health(self, request: Request) -> Response:
        return json_response(
            Health(
                uptime_secs=round(self._clock() - self._started, 3),
                devices=[self._device_health(device) for device in self._hardware.devices],
                ledger=self._ledger.grants,
                activation=self._activator.state,
                models=self._residents.loads(),
                failed=self._residents.failed(),
                requests=self._residents.requests(),
            )
        )

    def _device_health(self, device: Device) -> DeviceHealth:
        health = DeviceHealth(
            index=device.index,
            uuid=device.uuid,
            vram_total_mb=device.vram_total_mb,
            granted_bytes=self._ledger.granted(device.uuid),
            budget_bytes=self._ledger.budget(device.uuid),
        )
        reading = self._monitor.readings.get(device.uuid)
        if reading is not None:
            health.vram_used_mb = reading.used_bytes // MIB
            health.vram_free_mb = reading.free_bytes // MIB
            health.utilization_pct = reading.utilization_pct
            health.temp_c = reading.temp_c
        return health

    async def metrics(self, request: Request) -> Response:
        accept = request.headers.get("accept", "text/plain")
        body, content_type = self._metrics.render(self._residents.loads(), accept)
        return Response(body, content_type=content_type)

    # --- models ---

    async def models(self, request: Request) -> Response:
        return json_response(self._residents.reports())

    async def cards(self, request: Request) -> Response:
        cards = [_plain_card(report) for report in self._residents.reports() if report.status == "loaded"]
        return json_response({"object": "list", "data": cards})

    async def endpoint(self, request: Request) -> Response:
        report = self._known(request.params["id"])
        if report.status != "loaded":
            raise UnknownModel(f"{report.id} is {report.status} on this node.", param="model")
        return json_response({"url": f"http://{request.headers.get('host', socket.gethostname())}"})

    async def capabilities(self, request: Request) -> Response:
        report = self._known(request.params["id"])
        if not report.capabilities:
            raise UnknownModel(f"{report.id} has not been loaded yet, so nothing is known of it.")
        return json_response({"capabilities": report.capabilities})

    async def load(self, request: Request) -> Response | EventStream:
        """Ensures that a model is loaded: JSON when it is, or events for a client that accepts them."""
        order = _decode(LoadRequest, await request.body())
        for name in ("memory_mb", "tensor_parallel"):
            value = getattr(order, name)
            if value is not None and value < 1:
                raise BadRequest(f"{name} must be at least 1.", param=name)
        for name in ("harness", "quant", "dtype", "source"):
            if getattr(order, name) == "":
                raise BadRequest(f"{name} is empty: leave it out where there is nothing to say.", param=name)
        if order.hold_s is not None and not 0 <= order.hold_s <= MOST_HOLD_S:
            raise BadRequest(f"hold_s must be a number of seconds, {MOST_HOLD_S} at most.", param="hold_s")
        if "text/event-stream" in request.headers.get("accept", ""):
            return EventStream(self._load_events(order), fail=_load_failed, keep_alive=_keep_alive)
        return json_response(LoadReply(status="loaded", model=await self._residents.ensure(order)))

    async def unload(self, request: Request) -> Response:
        order = _decode(UnloadRequest, await request.body())
        await self._residents.unload(order.model_id, if_idle=order.if_idle)
        return json_response(LoadReply(status="unloaded", model=self._residents.report(order.model_id)))

    async def _load_events(self, order: LoadRequest) -> AsyncGenerator[bytes, None]:
        """The newest progress whenever there is a new one, then the end. A slow reader skips some."""
        latest: list[Progress] = []
        changed = asyncio.Event()

        def report(progress: Progress) -> None:
            latest[:] = [progress]
            changed.set()

        ensuring = asyncio.ensure_future(self._residents.ensure(order, report))
        ensuring.add_done_callback(lambda _: changed.set())
        try:
            while not ensuring.done() or latest:
                await changed.wait()
                changed.clear()
                if latest:
                    yield _event(LoadEvent(event="progress", progress=latest.pop()))
            yield _event(LoadEvent(event="loaded", model=ensuring.result()))
        finally:
            ensuring.cancel()
            await asyncio.gather(ensuring, return_exceptions=True)

    def _known(self, model_id: str) -> ModelReport:
        report = self._residents.report(model_id)
        if report is None:
            raise UnknownModel(f"This node knows no model {model_id!r}.", param="model")
        return report


def _decode(kind: type[W], body: bytes) -> W:
    """Raises BadRequest that names the field at fault."""
    try:
        order = msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise unreadable(error) from None
    if not getattr(order, "model_id", ""):
        raise BadRequest("model_id must name a model.", param="model_id")
    return order


def _event(event: LoadEvent) -> bytes:
    return sse.encode(msgspec.json.encode(event), event=event.event)


def _load_failed(error: CortexError) -> bytes:
    return _event(LoadEvent(event="error", error=to_object(error)["error"]))


def _keep_alive() -> bytes:
    return _COMMENT


_COMMENT: Final = sse.comment("loading")


def _plain_card(report: ModelReport) -> dict[str, object]:
    """With the members that OpenAI's clients expect, whatever their values."""
    card = ModelCard(
        id=report.id,
        created=int(report.loaded_at or 0),
        owned_by="neuron",
        loaded=True,
        limit=report.limit,
        capabilities=report.capabilities,
        tool_call=report.tool_call,
        reasoning=report.reasoning,
    )
    return {"object": card.object, "created": card.created, **msgspec.to_builtins(card)}


def _version() -> Version:
    try:
        torch = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        torch = None
    return Version(package_version=__version__, python_version=platform.python_version(), torch_version=torch)
