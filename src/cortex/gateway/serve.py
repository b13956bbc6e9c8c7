"""The main path: a client's request to the node that serves it, and the reply back.

Read `Serving.handle` first. Dialects turn bytes into calls and canonical events into bytes; placement
chooses the node; this module moves the bytes, tries another node while the client has nothing yet,
and settles the account. It knows no dialect by name.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from typing import Final

import msgspec

from cortex.gateway.auth import caller_of
from cortex.gateway.catalogue import Catalogue
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.observe import Account, Observers
from cortex.gateway.placement import RETRY_S, choose, why_not, why_unknown
from cortex.hookspecs import Call, Dialect, Encoder, Incoming, Operation
from cortex.web.asgi import EventStream, Request, Response
from cortex.web.client import Reply
from cortex.wire import sse
from cortex.wire.chat import Peek, edit_top_level, peek
from cortex.wire.errors import (
    Busy,
    CortexError,
    LoadFailed,
    Loading,
    NoCapacity,
    NodeLost,
    OverLimit,
    UnknownModel,
)

log: Final = logging.getLogger("cortex.serve")

ANOTHER_NODE_MAY_HELP: Final = (NodeLost, Busy, Loading, LoadFailed, OverLimit, UnknownModel)
ASK_FOR_USAGE: Final = {"stream_options": {"include_usage": True}}


class Serving:
    """Serves the calls of all dialects. One for the gateway's life; a request leaves nothing in it."""

    def __init__(
        self,
        fleet: Fleet,
        catalogue: Catalogue,
        observers: Observers,
        *,
        clock: Callable[[], float],
        idle_timeout: float,
        look_soon: Callable[[Node], None],
    ) -> None:
        """`look_soon` is called with a node that is otherwise than it was last seen."""
        self.fleet = fleet
        self.look_soon = look_soon
        self._catalogue = catalogue
        self._observers = observers
        self._clock = clock
        self._idle_timeout = idle_timeout

    async def handle(
        self, request: Request, dialect: Dialect, operation: Operation
    ) -> Response | EventStream:
        """One request of a dialect's operation. Raises CortexError for whatever is refused."""
        account = Account(
            self._observers,
            self._clock,
            request_id=request.id,
            dialect=dialect.name,
            kind=operation.kind,
            arrived=request.started,
        )
        try:
            body = await request.body()
            account.body_read()
            call = dialect.parse(
                Incoming(
                    kind=operation.kind,
                    body=body,
                    headers=request.headers,
                    params=request.params,
                    query=request.query,
                )
            )
            relay = Relay(self, dialect, self._resolve(call, account), account, request)
            if call.stream:
                return relay.streamed()
            return await relay.whole()
        except CortexError as error:
            account.settle_error(error, sent=False)
            raise
        except asyncio.CancelledError:
            account.settle_cancelled(request.cut)
            raise
        except Exception:
            account.settle("failed", 500)
            raise

    def _resolve(self, call: Call, account: Account) -> Call:
        model = self._catalogue.resolve(call.model)
        if self.fleet.knows(model):
            account.model = model
        elif model in self._catalogue.entries:
            account.model = model
            cold = UnknownModel(
                f"The model {model!r} is in the catalogue but no node has loaded it. Load it with "
                f"`cortex load {model}`.",
                code="model_not_loaded",
                param="model",
            )
            raise why_unknown(self.fleet, model, cold, named=True)
        else:
            raise why_unknown(self.fleet, call.model, named=model != call.model)
        return msgspec.structs.replace(call, served_model=model)

    def next_node(self, model: str, tried: set[str], last: CortexError | None) -> Node:
        """The next node to ask. Raises the last node's refusal, or why there is none to ask.

        A node that has the model no more is asked on an old report: the client hears that none serves it now.
        """
        replicas = self.fleet.replicas(model)
        node = choose(replicas, model, tried)
        if node is None:
            if isinstance(last, UnknownModel):
                last = NoCapacity(
                    f"No node serves the model {model!r} any more: {last.message}", retry_after=RETRY_S
                )
            raise last or why_not(replicas, model)
        tried.add(node.name)
        return node

    async def ask(self, node: Node, body: bytes, request: Request) -> Reply:
        return await node.client.chat(
            body,
            request.id,
            caller=caller_of(request),
            idle_timeout=self._idle_timeout,
            is_alive=lambda: node.lists(request.id),
        )


class Relay:
    """One call on its way: which nodes were tried, and what the client has had."""

    def __init__(
        self, serving: Serving, dialect: Dialect, call: Call, account: Account, request: Request
    ) -> None:
        self._serving = serving
        self._dialect = dialect
        self._call = call
        self._account = account
        self._request = request
        self._tried: set[str] = set()
        request.log["model"] = call.served_model

    async def whole(self) -> Response:
        """The reply in one piece."""
        body = self._body_for_node()
        refusal: CortexError | None = None
        while True:
            node = self._next_node(refusal)
            try:
                with self._serving.fleet.lease(node, self._call.served_model):
                    async with await self._serving.ask(node, body, self._request) as reply:
                        answer = await reply.read()
                self._read_along(node, answer)
                rendered = self._dialect.render(self._call, answer)
            except ANOTHER_NODE_MAY_HELP as error:
                self._refused(node, error)
                refusal = error
                continue
            self._account.settle("ok", 200)
            return Response(rendered)

    def streamed(self) -> EventStream:
        """The reply as events. Nothing is asked of a node before the stream is read."""
        self._account.streamed = True
        encoder = self._dialect.stream(self._call)
        return EventStream(self._events(encoder), fail=encoder.fail, keep_alive=encoder.keep_alive)

    async def _events(self, encoder: Encoder) -> AsyncGenerator[bytes, None]:
        sent = False
        try:
            async with aclosing(self._events_of_some_node(encoder)) as events:
                async for data in events:
                    sent = True
                    yield data
            self._account.settle("ok", 200)
        except CortexError as error:
            self._account.settle_error(error, sent=sent)
            raise
        except (asyncio.CancelledError, GeneratorExit):
            self._account.settle_cancelled(self._request.cut)
            raise
        except Exception:
            self._account.settle("failed", 500)
            raise

    async def _events_of_some_node(self, encoder: Encoder) -> AsyncGenerator[bytes, None]:
        """Until a node has sent its first event another one can be tried."""
        body = self._body_for_node()
        refusal: CortexError | None = None
        while True:
            node = self._next_node(refusal)
            sent = False
            try:
                async with aclosing(self._events_of(node, body, encoder)) as events:
                    async for data in events:
                        sent = True
                        yield data
                return
            except ANOTHER_NODE_MAY_HELP as error:
                if sent:
                    raise
                self._refused(node, error)
                refusal = error

    async def _events_of(self, node: Node, body: bytes, encoder: Encoder) -> AsyncGenerator[bytes, None]:
        """One node's stream: every socket read becomes one piece of whole events for the client. An error in
        the first one is raised without those before it, since another node can still be tried.
        """
        decoder = sse.Decoder()
        begun = ended = False
        with self._serving.fleet.lease(node, self._call.served_model):
            reply = await self._serving.ask(node, body, self._request)
            async with reply, aclosing(reply.chunks()) as chunks:
                async for chunk in chunks:
                    events, failure = _until_error(node, decoder.feed(chunk))
                    if failure is not None and not begun:
                        raise failure
                    out = []
                    for event, seen in events:
                        ended = ended or event.data == b"[DONE]"
                        self._account.saw(seen)
                        out.append(encoder.feed(event, seen))
                    if data := b"".join(out):
                        begun = True
                        yield data
                    if failure is not None:
                        raise failure
        if not ended:
            raise NodeLost(f"Node {node.name} ended the stream before its end.")
        if data := encoder.finish():
            yield data

    def _next_node(self, refusal: CortexError | None) -> Node:
        node = self._serving.next_node(self._call.served_model, self._tried, refusal)
        if refusal is not None:
            self._account.retry(refusal.code)
        self._account.dispatched(node.name)
        self._request.log["node"] = node.name
        return node

    def _refused(self, node: Node, error: CortexError) -> None:
        if isinstance(error, UnknownModel):
            self._serving.look_soon(node)
        log.info("node refused id=%s node=%s error=%r", self._request.id, node.name, error.message)

    def _body_for_node(self) -> bytes:
        """The client's bytes; edited only for an alias, and to get the usage of a stream."""
        call = self._call
        changes = {"model": call.served_model} if call.renamed else {}
        inside = ASK_FOR_USAGE if call.stream and not call.wants_usage else {}
        return edit_top_level(call.body, changes, inside) if changes or inside else call.body

    def _read_along(self, node: Node, answer: bytes) -> None:
        """Usage for the account. Raises NodeLost if the answer is no JSON object."""
        seen = peek(answer)
        if seen.error is not None or not answer.lstrip().startswith(b"{"):
            raise NodeLost(f"Node {node.name} answered with something else than a completion.")
        self._account.saw_usage(seen)


def _until_error(
    node: Node, events: Iterable[sse.Event]
) -> tuple[list[tuple[sse.Event, Peek]], CortexError | None]:
    """The events before the first that tells of an error, what they hold, and that error."""
    before: list[tuple[sse.Event, Peek]] = []
    for event in events:
        seen = peek(event.data)
        if seen.error is not None:
            return before, _failure(node, event.data)
        before.append((event, seen))
    return before, None


def _failure(node: Node, data: bytes) -> CortexError:
    """The error that a node reported in the middle of its stream."""
    told = msgspec.json.decode(data)["error"]
    message = told.get("message") if isinstance(told, dict) else told
    code = told.get("code") if isinstance(told, dict) else None
    return NodeLost(f"Node {node.name} failed: {message}", code=code if isinstance(code, str) else None)
