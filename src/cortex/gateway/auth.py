"""Who may use the gateway: clients with a key; without any key, clients on this machine only.

Knows no dialect: where a credential stands in a request is the dialect's to say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from cortex.web.asgi import Request
from cortex.web.peers import is_direct_loopback
from cortex.wire.errors import Unauthorized


class Access:
    """`keys` maps a caller's name to its key."""

    def __init__(self, keys: Mapping[str, str], *, allow_anonymous: bool = False) -> None:
        self._names = {_digest(key): name for name, key in keys.items()}
        self._allow_anonymous = allow_anonymous

    def check(self, request: Request, credential: str | None) -> str | None:
        """The caller's name, or None for an anonymous one. Raises Unauthorized.

        Looking a digest up tells a guesser nothing about the keys by its timing.
        """
        if credential is not None and self._names:
            name = self._names.get(_digest(credential))
            if name is not None:
                return name
            if not self._allow_anonymous:
                raise Unauthorized("The API key is not one of this gateway's keys.")
        if self._allow_anonymous:
            return None
        if self._names:
            raise Unauthorized("An API key is needed: send `Authorization: Bearer <key>`.")
        if is_direct_loopback(request.client, request.headers):
            return None
        raise Unauthorized(
            "This gateway has no keys and serves clients on its own machine only. To serve others add "
            '[[keys]] with name and key to cortex.toml, or set gateway.allow_anonymous = true.'
        )


def caller_of(request: Request) -> str | None:
    """The name of the key that an admitted request came with, as its log line shows it."""
    name = request.log.get("caller")
    return name if isinstance(name, str) else None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
