"""Who may use the node: those with its token; without a token, clients on this machine only."""

from __future__ import annotations

import hmac
from typing import Final

from cortex.web.asgi import Request
from cortex.web.peers import bearer, is_direct_loopback
from cortex.web.service import Guard, Route
from cortex.wire.errors import Unauthorized

OPEN: Final = frozenset({"/health", "/discovery", "/version", "/metrics"})
"""Paths that anybody may read: they tell how the node is, and change nothing."""


def node_guard(token: str | None) -> Guard:
    """Raises Unauthorized for a request that may not come in. The comparison takes constant time."""

    def guard(request: Request, route: Route | None) -> None:
        if request.path in OPEN:
            return
        if token is None:
            if is_direct_loopback(request.client, request.headers):
                return
            raise Unauthorized(
                "This node has no node_token and serves clients on its own machine only. To serve others, "
                "set node_token in its configuration and the same at the gateway's [[neurons]]."
            )
        given = bearer(request.headers)
        if given is None:
            raise Unauthorized("This node needs its token: send `Authorization: Bearer <node_token>`.")
        if not hmac.compare_digest(given.encode(), token.encode()):
            raise Unauthorized("The token is not this node's node_token.")

    return guard
