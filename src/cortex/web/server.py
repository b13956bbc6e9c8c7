"""Serves ASGI apps on TCP until it is told to stop.

Sockets are bound and listening before anything else happens, so that a port in use is an error of the
start and port 0 works. The caller chooses the event loop. Does not know what the apps are.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from typing import Final

from cortex.web.asgi import ASGIApp
from cortex.web.listener import BACKLOG, listen

STALLED_MS: Final = 60_000
"""A peer that acknowledges nothing for so long loses its connection, whatever still waits to be sent."""


class BindError(Exception):
    """An address cannot be listened on; the message names it and says why."""


async def serve(
    listeners: Sequence[tuple[str, ASGIApp]],
    *,
    stop: asyncio.Event,
    on_ready: Callable[[list[str]], None] | None = None,
    on_stop: Callable[[], None] | None = None,
    cut: Callable[[], None] | None = None,
    drain_s: float = 30.0,
) -> None:
    """Serve each app on its `host:port` until `stop`, then let running requests end for `drain_s` seconds.

    `on_ready` gets the real addresses, in order, when connections are accepted. `on_stop` makes the apps
    refuse work that is new; with it connections are accepted until the running requests have ended, so
    that nobody who asks how we are takes us for gone, and the requests with us. `cut`, which may be called
    more than once, makes the apps end what runs after that; connections are closed a moment later.
    Raises BindError.
    """
    sockets = bind_all([bind for bind, _ in listeners])
    addresses = [_shown(sock) for sock in sockets]
    async with asyncio.TaskGroup() as servers:
        for sock, (_, app) in zip(sockets, listeners, strict=True):
            servers.create_task(listen(sock, app, stop, drain_s, lingers=on_stop is not None, cut=cut))
        if on_ready is not None:
            on_ready(addresses)
        await stop.wait()
        if on_stop is not None:
            on_stop()


def bind_all(binds: Sequence[str]) -> list[socket.socket]:
    """Listening sockets for `host:port` addresses, all or none. Raises BindError."""
    sockets: list[socket.socket] = []
    try:
        for bind in binds:
            sockets.append(_bind(bind))
    except BindError:
        for sock in sockets:
            sock.close()
        raise
    return sockets


def _bind(bind: str) -> socket.socket:
    host, colon, port = bind.rpartition(":")
    host = host.strip("[]")
    if not colon or not host or not port.isdecimal() or int(port) > 65535:
        raise BindError(f"cannot listen on {bind!r}: expected host:port, such as 127.0.0.1:8080")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise BindError(f"cannot listen on {bind}: {_cause(error)}") from None
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Accepted sockets inherit it. A server cannot drop what a stalled client never takes; the kernel can.
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MS)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise BindError(f"cannot listen on {bind}: {_cause(error)}") from None
    return sock


def _shown(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _cause(error: OSError | UnicodeError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)
