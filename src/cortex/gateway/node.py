"""The client of one neuron: its routes as typed calls. Keeps no picture of the node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final
from urllib.parse import quote

import msgspec

from cortex.web.client import Reply
from cortex.web.pool import Pool
from cortex.wire.errors import NodeLost, from_reply
from cortex.wire.node import CALLER_HEADER, Discovery, Health, ModelReport, Version

POLL_TIMEOUT_S: Final = 5.0
MAX_REPORT: Final = 16 * 2**20
MAX_REFUSAL: Final = 2**20
"""Bytes of an error body that are read."""


class NodeClient:
    def __init__(self, name: str, endpoint: str, pool: Pool, token: str | None = None) -> None:
        self.name = name
        self.endpoint = endpoint.rstrip("/")
        self._pool = pool
        self._auth = [("authorization", f"Bearer {token}")] if token else []
        self._chat_headers = [("content-type", "application/json"), *self._auth]

    async def chat(
        self,
        body: bytes,
        request_id: str,
        *,
        caller: str | None,
        idle_timeout: float,
        is_alive: Callable[[], bool],
    ) -> Reply:
        """Asks for a completion. Returns the open reply of status 200; raises the refusal otherwise.

        The node counts the request as one of `caller`, or where that is None as one of ours. `is_alive` is
        asked when nothing has come for `idle_timeout` seconds: while it is true, silence is work.
        """
        headers = [*self._chat_headers, ("x-request-id", request_id)]
        if caller is not None:
            headers.append((CALLER_HEADER, quote(caller)))
        reply = await self._pool.request(
            "POST",
            f"{self.endpoint}/v1/chat/completions",
            headers=headers,
            body=body,
            idle_timeout=idle_timeout,
            is_alive=is_alive,
        )
        if reply.status == 200:
            return reply
        async with reply:
            refusal = await reply.read(MAX_REFUSAL)
        raise from_reply(reply.status, refusal, reply.headers.get("retry-after"))

    async def models(self) -> list[ModelReport]:
        models: list[ModelReport] = await self._get("/models", list[ModelReport])
        return models

    async def health(self) -> Health:
        health: Health = await self._get("/health", Health)
        return health

    async def discovery(self) -> Discovery:
        discovery: Discovery = await self._get("/discovery", Discovery)
        return discovery

    async def version(self) -> Version:
        version: Version = await self._get("/version", Version)
        return version

    async def forward(self, path: str, body: bytes, accept: str, idle_timeout: float) -> Reply:
        """Posts an operator's order as it came."""
        headers = [*self._chat_headers, ("accept", accept)]
        url = f"{self.endpoint}{path}"
        return await self._pool.request("POST", url, headers=headers, body=body, idle_timeout=idle_timeout)

    def abort(self, reason: str) -> None:
        """Breaks every connection to the node; whoever reads from one gets NodeLost."""
        self._pool.abort(self.endpoint, reason)

    async def _get(self, path: str, kind: Any) -> Any:
        async with await self._pool.request(
            "GET", self.endpoint + path, headers=self._auth, idle_timeout=POLL_TIMEOUT_S
        ) as reply:
            body = await reply.read(MAX_REPORT)
        if reply.status != 200:
            raise NodeLost(f"node {self.name} answered {reply.status} to GET {path}")
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise NodeLost(f"node {self.name} answered GET {path} with something else: {error}") from None
