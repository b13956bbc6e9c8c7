"""A cortex endpoint as the commands see it: JSON calls and event streams over one pool.

The endpoint may be a gateway or a single neuron; `is_neuron` tells which. Every failure leaves as a
Failure with one line that says what was tried and what to do. Knows no command and prints nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

import click
import msgspec

from cortex.cli.failure import Failure, Interrupted, Misuse
from cortex.web.client import ConnectFailed, Reply
from cortex.web.pool import Pool
from cortex.wire.errors import CortexError, NodeLost, Unauthorized, from_reply
from cortex.wire.sse import Decoder, Event

DEFAULT_ENDPOINT: Final = "http://127.0.0.1:31313"
IDLE_TIMEOUT_S: Final = 300.0
"""Seconds without a byte, in any phase of a request; servers send something every ten."""

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])


class Address(msgspec.Struct, frozen=True):
    """Where to ask, and with which key."""

    endpoint: str = DEFAULT_ENDPOINT
    key: str | None = None


def address_options(command: F) -> F:
    """`--endpoint` and `--key`, with their variables, as a click decorator."""
    key = click.option(
        "--key",
        envvar="CORTEX_API_KEY",
        help="API key, or a neuron's node_token. Better given in CORTEX_API_KEY.",
    )
    endpoint = click.option(
        "--endpoint",
        envvar="CORTEX_ENDPOINT",
        default=DEFAULT_ENDPOINT,
        show_default=True,
        callback=lambda ctx, param, value: clean_endpoint(value),
        help="A gateway or a neuron; also CORTEX_ENDPOINT.",
    )
    return endpoint(key(command))


def clean_endpoint(text: str) -> str:
    """The origin `http(s)://host:port` that people mean. Raises Misuse if it cannot be one."""
    url = text.strip() if "://" in text else f"http://{text.strip()}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1)
    except ValueError:
        usable = None
    if not usable or parts.query or parts.path.rstrip("/") not in ("", "/v1"):
        raise Misuse(
            f"{text!r} is no endpoint; give --endpoint or CORTEX_ENDPOINT a URL like {DEFAULT_ENDPOINT}."
        )
    return f"{parts.scheme}://{parts.netloc}"


class Client:
    def __init__(self, address: Address, pool: Pool) -> None:
        self.endpoint = address.endpoint
        self._auth = [("authorization", f"Bearer {address.key}")] if address.key else []
        self._pool = pool
        self._is_neuron: bool | None = None

    async def is_neuron(self) -> bool:
        """True if a neuron answers at the endpoint; a gateway has no `/discovery`. Asked once."""
        if self._is_neuron is None:
            async with await self._open("GET", "/discovery", None, "application/json") as reply:
                body = await self._read(reply)
            self._is_neuron = reply.status == 200 and b'"hostname"' in body
        return self._is_neuron

    async def get(self, path: str, kind: type[T]) -> T:
        async with await self._open("GET", path, None, "application/json") as reply:
            return self._decode(await self._body(reply), kind, f"GET {path}")

    async def post(self, path: str, body: object, kind: type[T]) -> T:
        async with await self._open("POST", path, body, "application/json") as reply:
            return self._decode(await self._body(reply), kind, f"POST {path}")

    async def events(self, path: str, body: object, *, or_json: bool = False) -> AsyncGenerator[Event, None]:
        """Posts `body` and gives each event that carries data, as it arrives.

        With `or_json` a server may also answer in one piece, which is then the only event.
        """
        async with await self._open("POST", path, body, "text/event-stream") as reply:
            if reply.status != 200:
                raise refused(from_reply(reply.status, await self._read(reply)))
            if "text/event-stream" not in reply.headers.get("content-type", ""):
                if or_json:
                    yield Event(data=await self._read(reply))
                    return
                raise self._nonsense(f"POST {path}", "events were expected")
            decoder = Decoder()
            try:
                async for chunk in reply.chunks():
                    for event in decoder.feed(chunk):
                        if event.data:
                            yield event
            except CortexError as error:
                raise refused(error) from None

    async def _open(self, method: str, path: str, body: object, accept: str) -> Reply:
        headers = [("accept", accept), *self._auth]
        payload = b""
        if body is not None:
            payload = msgspec.json.encode(body)
            headers.append(("content-type", "application/json"))
        try:
            return await self._pool.request(
                method, self.endpoint + path, headers=headers, body=payload, idle_timeout=IDLE_TIMEOUT_S
            )
        except ConnectFailed as error:
            cause = error.message.rpartition(": ")[2].rstrip(".")
            raise Failure(
                f"nothing answers at {self.endpoint} ({cause}); start it with `cortex up`, "
                f"or name another with --endpoint or CORTEX_ENDPOINT."
            ) from None
        except CortexError as error:
            raise refused(error) from None

    async def _read(self, reply: Reply) -> bytes:
        try:
            return await reply.read()
        except CortexError as error:
            raise refused(error) from None

    async def _body(self, reply: Reply) -> bytes:
        body = await self._read(reply)
        if reply.status >= 300:
            raise refused(from_reply(reply.status, body))
        return body

    def _decode(self, body: bytes, kind: type[T], what: str) -> T:
        try:
            return msgspec.json.decode(body, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._nonsense(what, str(error)) from None

    def _nonsense(self, what: str, detail: str) -> Failure:
        return Failure(f"{self.endpoint} answered {what} with something else ({detail}); is it a cortex?")


async def make_pool() -> Pool:
    """A pool of the running loop."""
    return Pool()


def refused(error: CortexError) -> Failure:
    """A refusal as the user sees it."""
    message = error.message
    if isinstance(error, Unauthorized):
        message = f"{message} Keys go into CORTEX_API_KEY."
    elif isinstance(error, NodeLost) and not message:
        message = "the connection was lost."
    return Failure(message)


def run(address: Address, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """Runs `work` with a client of its own. Ctrl-C ends the command with status 130 and no traceback."""

    async def with_client() -> T:
        pool = await make_pool()
        try:
            return await work(Client(address, pool))
        finally:
            await pool.aclose()

    try:
        return asyncio.run(with_client())
    except KeyboardInterrupt:
        raise Interrupted from None
