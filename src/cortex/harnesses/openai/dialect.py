"""The OpenAI dialect. The canonical exchange is OpenAI's own, so nearly every byte passes through.

Checks only what routing needs (a JSON object, `model`, `messages`); all other parameters are the
node's to honour or to refuse. Knows nothing of nodes and of aliases beyond the two names of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from msgspec import Raw

from cortex.hookspecs import Call, Encoder, Headers, Incoming, Kind, Operation, Rendered
from cortex.wire import sse
from cortex.wire.chat import Peek, StreamOptions, edit_top_level, unreadable
from cortex.wire.errors import BadRequest, CortexError, headers_of, to_bytes
from cortex.wire.node import ModelCard


class _Head(msgspec.Struct):
    """The members of a chat request that routing reads; the rest is only checked to be JSON."""

    model: str | None = None
    messages: list[Raw] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


_head: Final = msgspec.json.Decoder(_Head)


class OpenAIDialect:
    name = "openai"
    operations: Sequence[Operation] = (
        Operation("POST", "/v1/chat/completions", Kind.CHAT),
        Operation("GET", "/v1/models", Kind.MODELS),
        Operation("GET", "/v1/models/{model:path}", Kind.MODELS),
    )

    def credential(self, headers: Headers) -> str | None:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        return token.strip() or None if scheme.lower() == "bearer" else None

    def parse(self, incoming: Incoming) -> Call:
        """Raises BadRequest that names the member at fault."""
        if incoming.kind is Kind.MODELS:
            return Call(kind=incoming.kind, model=incoming.params.get("model", ""))
        try:
            head = _head.decode(incoming.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise unreadable(error) from None
        if not head.model:
            raise BadRequest(
                "The request names no model: set `model` to an id that GET /v1/models lists.",
                code="missing_model_field",
                param="model",
            )
        if not head.messages:
            raise BadRequest("The request has no `messages`: send at least one message.", param="messages")
        options = head.stream_options
        return Call(
            kind=incoming.kind,
            model=head.model,
            body=incoming.body,
            stream=bool(head.stream),
            wants_usage=bool(options and options.include_usage),
        )

    def stream(self, call: Call) -> Encoder:
        return OpenAIEncoder(call)

    def render(self, call: Call, reply: bytes) -> bytes:
        return edit_top_level(reply, {"model": call.model}) if call.renamed else reply

    def render_models(self, call: Call, cards: Sequence[ModelCard]) -> bytes:
        listed = [_listed(card) for card in cards]
        return msgspec.json.encode(listed[0] if call.model else {"object": "list", "data": listed})

    def render_error(self, error: CortexError) -> Rendered:
        return error.status, [("content-type", "application/json"), *headers_of(error)], to_bytes(error)


class OpenAIEncoder:
    """Passes events on as they came, but for the model's name under an alias and unasked-for usage."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self._done = False

    def feed(self, event: sse.Event, peek: Peek) -> bytes:
        if peek.usage_only and not self._call.wants_usage:
            return b""
        if event.data == b"[DONE]":
            self._done = True
        elif self._call.renamed and event.data.startswith(b"{"):
            return sse.encode(edit_top_level(event.data, {"model": self._call.model}))
        return event.raw

    def keep_alive(self) -> bytes:
        return sse.comment("keep-alive")

    def fail(self, error: CortexError) -> bytes:
        return sse.encode(to_bytes(error))

    def finish(self) -> bytes:
        return b"" if self._done else sse.DONE


def _listed(card: ModelCard) -> dict[str, Any]:
    """A card with `created` and `loaded` always there, and the flat limit that many clients look for."""
    plain: dict[str, Any] = {
        **msgspec.to_builtins(card),
        "object": card.object,
        "created": card.created,
        "owned_by": card.owned_by,
        "loaded": card.loaded,
        "locations": card.locations,
        "capabilities": card.capabilities,
    }
    if card.limit and card.limit.context:
        plain["max_model_len"] = card.limit.context
    return plain
