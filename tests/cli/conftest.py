"""A made-up endpoint in memory, a gateway or a neuron, and the command line pointed at it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner, Result

from cortex.cli import main
from cortex.testing import memory_connect
from cortex.web.asgi import EventStream, Request, Response, json_response
from cortex.web.pool import Pool
from cortex.web.service import Route, Service
from cortex.wire import sse
from cortex.wire.errors import CortexError, to_bytes

ENDPOINT = "http://fleet.test:31313"


class Endpoint:
    """Answers by table: `(method, path)` to a JSON value, a list of events, or an error."""

    def __init__(self) -> None:
        self.answers: dict[tuple[str, str], Any] = {}
        self.asked: list[tuple[str, str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.app = Service(
            [Route(method, "/{rest:path}", self._handle) for method in ("GET", "POST")], name="endpoint"
        )

    def on(self, method: str, path: str, answer: Any) -> Endpoint:
        """JSON, bytes as they are, or an error."""
        self.answers[method, path] = answer
        return self

    def stream(self, path: str, *items: Any) -> Endpoint:
        """Events for a POST: JSON values, bytes as they are, an error that ends the stream."""
        return self.on("POST", path, Events(*items))

    def speak(self, *words: str, finish: str | None = "stop") -> Endpoint:
        """A streamed chat completion; without `finish` it breaks off."""
        chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"content": word}}]} for word in words]
        if finish:
            chunks += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}, sse.DONE]
        return self.stream("/v1/chat/completions", *chunks)

    async def _handle(self, request: Request) -> Response | EventStream:
        body = await request.body()
        self.asked.append((request.method, request.path, msgspec.json.decode(body) if body else None))
        self.headers.append(request.headers)
        answer = self.answers.get((request.method, request.path))
        if answer is None:
            return json_response({"error": {"message": "no such route", "code": "unknown_route"}}, 404)
        if isinstance(answer, CortexError):
            raise answer
        if isinstance(answer, Events):
            return EventStream(answer.send(), fail=lambda error: sse.encode(to_bytes(error)))
        return Response(answer) if isinstance(answer, bytes) else json_response(answer)


class Events:
    def __init__(self, *items: Any) -> None:
        self._items = items

    async def send(self) -> AsyncIterator[bytes]:
        for item in self._items:
            if isinstance(item, CortexError):
                raise item
            yield item if isinstance(item, bytes) else sse.encode(msgspec.json.encode(item))


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """What answers at the address that every command of the test asks."""
    made = Endpoint()
    network = memory_connect({ENDPOINT: made.app})

    async def make_pool() -> Pool:
        return Pool(connect=network)

    monkeypatch.setattr("cortex.cli.client.make_pool", make_pool)
    monkeypatch.setattr("cortex.cli.chat.make_pool", make_pool)
    monkeypatch.setenv("CORTEX_ENDPOINT", ENDPOINT)
    monkeypatch.delenv("CORTEX_API_KEY", raising=False)
    return made


@pytest.fixture
def cortex() -> Callable[..., Result]:
    """Runs `cortex ARGS`; a traceback fails the test."""

    def run(*args: str, input: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args], input=input)
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
