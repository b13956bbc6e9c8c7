"""The gateway's composition root: builds every part, starts and stops what runs in the background.

The only gateway module that reads the configuration.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable
from typing import Final

from cortex.config import GatewayConfig, ModelsConfig
from cortex.gateway.auth import Access
from cortex.gateway.catalogue import Catalogue, Entry
from cortex.gateway.fleet import Fleet
from cortex.gateway.listing import Listing
from cortex.gateway.metrics import GatewayMetrics
from cortex.gateway.node import NodeClient
from cortex.gateway.observe import Observers
from cortex.gateway.operator import Operator
from cortex.gateway.poller import Poller
from cortex.gateway.serve import Serving
from cortex.hookspecs import Dialect, Headers, Incoming, Kind, Operation
from cortex.plugins import GatewayPlugins, load_gateway_plugins
from cortex.web.asgi import EventStream, Handler, Request, Response, json_response
from cortex.web.idle import CallLater, Clock, loop_call_later
from cortex.web.peers import bearer
from cortex.web.pool import Pool
from cortex.web.service import Route, Service
from cortex.web.stream import Connect, open_tcp
from cortex.wire.errors import Busy

CONNECTIONS_PER_NODE: Final = 1024
"""Bounds the sockets to one node; requests beyond wait in line here, not in the node's backlog."""
STOPPING_RETRY_S: Final = 15
"""Until a gateway that stops may be back."""

Credential = Callable[[Headers], str | None]


class Gateway:
    """The assembled gateway: `app` and `metrics_app` are ASGI applications."""

    def __init__(self, app: Service, metrics_app: Service, poller: Poller, pool: Pool, fleet: Fleet) -> None:
        self.app = app
        self.metrics_app = metrics_app
        self.fleet = fleet
        self.poller = poller
        self._pool = pool

    async def start(self) -> None:
        """Looks at every node once, then keeps looking in the background."""
        await self.poller.start()

    def cut(self) -> None:
        """End the requests that are under way, and tell their clients why."""
        self.app.cut(Busy("This gateway is stopping.", code="stopping", retry_after=STOPPING_RETRY_S))

    async def stop(self) -> None:
        await self.poller.stop()
        await self._pool.aclose()


def build_gateway(
    config: GatewayConfig,
    models: ModelsConfig,
    *,
    plugins: GatewayPlugins | None = None,
    connect: Connect = open_tcp,
    clock: Clock = time.monotonic,
    call_later: CallLater = loop_call_later,
) -> Gateway:
    """Raises PluginError if a plugin cannot be used."""
    plugins = plugins or load_gateway_plugins()
    section = config.gateway
    pool = Pool(connect=connect, per_host=CONNECTIONS_PER_NODE, clock=clock, call_later=call_later)
    clients = [NodeClient(node.name, node.endpoint, pool, node.node_token) for node in config.neurons]
    fleet = Fleet(clients, clock=clock)
    catalogue = _catalogue(models)
    metrics = GatewayMetrics()
    observers = Observers([metrics, *plugins.observers.values()])
    access = Access({key.name: key.key for key in config.keys}, allow_anonymous=section.allow_anonymous)
    listing = Listing(fleet, catalogue)
    poller = Poller(fleet, observers, interval=section.poll_interval_s)
    serving = Serving(
        fleet,
        catalogue,
        observers,
        clock=clock,
        idle_timeout=section.idle_timeout_s,
        look_soon=poller.look_soon,
    )
    routes = [
        *_dialect_routes(plugins.dialects.values(), serving, listing, access),
        *_own_routes(listing, Operator(fleet, poller.poll), access),
    ]
    app = Service(
        routes,
        clock=clock,
        call_later=call_later,
        body_cap=section.body_limit_mb * 2**20,
        name="gateway",
    )
    scrape = Route("GET", "/metrics", _metrics_handler(metrics), routine=True)
    return Gateway(
        app,
        Service([scrape], clock=clock, name="metrics"),
        poller,
        pool,
        fleet,
    )


def _catalogue(models: ModelsConfig) -> Catalogue:
    entries = [
        Entry(
            id=model.id,
            source=model.source,
            harness=model.harness,
            limit=model.limit.to_wire() if model.limit else None,
            cost=model.cost,
            capabilities=model.capabilities,
        )
        for model in models.models
    ]
    return Catalogue(entries, models.aliases)


def _dialect_routes(
    dialects: Iterable[Dialect], serving: Serving, listing: Listing, access: Access
) -> list[Route]:
    return [
        Route(
            operation.method,
            operation.path,
            _guarded(_operation_handler(dialect, operation, serving, listing), dialect.credential, access),
            render_error=dialect.render_error,
            matches=operation.matches,
        )
        for dialect in dialects
        for operation in dialect.operations
    ]


def _operation_handler(
    dialect: Dialect, operation: Operation, serving: Serving, listing: Listing
) -> Callable[[Request], Awaitable[Response | EventStream]]:
    if operation.kind is not Kind.MODELS:
        return lambda request: serving.handle(request, dialect, operation)

    async def models(request: Request) -> Response:
        incoming = Incoming(
            kind=operation.kind,
            body=b"",
            headers=request.headers,
            params=request.params,
            query=request.query,
        )
        call = dialect.parse(incoming)
        cards = [listing.card(call.model)] if call.model else listing.cards()
        return Response(dialect.render_models(call, cards))

    return models


def _own_routes(listing: Listing, operator: Operator, access: Access) -> list[Route]:
    async def health(request: Request) -> Response:
        return json_response(listing.health())

    async def nodes(request: Request) -> Response:
        return json_response(listing.nodes())

    return [
        Route("GET", "/health", health, routine=True),
        Route("GET", "/", health, routine=True),
        Route("GET", "/nodes", _guarded(nodes, bearer, access)),
        Route("POST", "/nodes/{node}/load", _guarded(operator.load, bearer, access)),
        Route("POST", "/nodes/{node}/unload", _guarded(operator.unload, bearer, access)),
    ]


def _guarded(handler: Handler, credential: Credential, access: Access) -> Handler:
    async def guarded(request: Request) -> Response | EventStream:
        caller = access.check(request, credential(request.headers))
        if caller is not None:
            request.log["caller"] = caller
        return await handler(request)

    return guarded


def _metrics_handler(metrics: GatewayMetrics) -> Handler:
    async def handler(request: Request) -> Response:
        body, headers = metrics.render(request.headers.get("accept", "text/plain"))
        return Response(body, content_type=headers["Content-Type"])

    return handler
