"""What the benchmark's clients ask and its upstream answers: three kinds of chat, as exact bytes.

The upstream takes its answers from here, the load generator its requests and the check that a reply
came through whole. Knows no sockets and no gateways.
"""

from __future__ import annotations

import json
import re
from enum import StrEnum
from typing import Final

MODEL: Final = "bench"
EVENTS: Final = 66
"""Data events of a streamed reply: the role, 64 pieces of text, the finish reason; `[DONE]` is extra."""
PACE: Final = 0.005
"""Seconds between two events of a paced reply."""
WORD: Final = "word"
_DONE: Final = b"data: [DONE]\n\n"
_WANTS_USAGE: Final = re.compile(rb'"include_usage"\s*:\s*true')
_USAGE: Final = {"prompt_tokens": 120, "completion_tokens": EVENTS - 2, "total_tokens": 118 + EVENTS}


class Kind(StrEnum):
    """How the upstream answers."""

    PLAIN = "plain"
    BURST = "burst"
    PACED = "paced"


_SYSTEM: Final = "You are a careful assistant that answers in short sentences. " * 8


def request_body(kind: Kind) -> bytes:
    """A chat request as an ordinary client sends it. Its last message tells the upstream the kind."""
    messages = [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": f"Please give the answer-{kind} to this question."},
    ]
    body: dict[str, object] = {"model": MODEL, "messages": messages, "max_tokens": 256, "temperature": 0.7}
    if kind is not Kind.PLAIN:
        body["stream"] = True
    return json.dumps(body).encode()


def asked_kind(body: bytes) -> Kind:
    """The kind that a request names, whatever a gateway on the way made of its JSON."""
    if b"answer-burst" in body:
        return Kind.BURST
    return Kind.PACED if b"answer-paced" in body else Kind.PLAIN


def wants_usage(body: bytes) -> bool:
    """True if the request, or a gateway on the way, asked for the closing usage event."""
    return _WANTS_USAGE.search(body) is not None


def completion() -> bytes:
    """The plain reply: a whole chat completion of 64 words."""
    message = {"role": "assistant", "content": f" {WORD}" * (EVENTS - 2)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    return _json({**_envelope("chat.completion"), "choices": [choice], "usage": _USAGE})


def events(usage: bool) -> list[bytes]:
    """The events of a streamed reply, `[DONE]` last; `usage` adds the usage event before it."""
    deltas = [{"role": "assistant", "content": ""}, *[{"content": f" {WORD}"}] * (EVENTS - 2), {}]
    chunks = [_chunk(delta, "stop" if not delta else None) for delta in deltas]
    if usage:
        chunks.append({**_envelope("chat.completion.chunk"), "choices": [], "usage": _USAGE})
    return [*(b"data: %b\n\n" % _json(chunk) for chunk in chunks), _DONE]


def fault(kind: Kind, status: int, body: bytes) -> str | None:
    """Why a reply is not the whole answer; None if it is. `body` is without its transfer coding."""
    if status != 200:
        return f"status {status}: {body[:200].decode(errors='replace')}"
    words = body.count(WORD.encode())
    if words != EVENTS - 2:
        return f"{words} of {EVENTS - 2} words"
    if kind is Kind.PLAIN:
        return None
    found = body.count(b"data: ") - 1
    if found != EVENTS:
        return f"{found} of {EVENTS} events"
    return None if body.rstrip().endswith(_DONE.rstrip()) else "no [DONE] at the end"


def _chunk(delta: dict[str, str], finish: str | None) -> dict[str, object]:
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    return {**_envelope("chat.completion.chunk"), "choices": [choice]}


def _envelope(kind: str) -> dict[str, object]:
    return {"id": "chatcmpl-bench", "object": kind, "created": 1750000000, "model": MODEL}


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
