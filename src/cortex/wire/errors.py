"""The error tree: every failure that a client can meet, with its HTTP status and its stable code.

Also the canonical (OpenAI-shaped) envelope in which a neuron reports an error to the gateway, both
ways. Knows no dialect: how an error looks to a client is the dialect's business.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final

import msgspec

MAX_RETRY_AFTER: Final = 60
"""Seconds. Clients honour longer waits by giving up."""


class CortexError(Exception):
    """A failure with a status, a stable `code` and a message that says what to do.

    `retry_after` is in seconds, rounded up and capped at 60; leave it out where waiting cannot help.
    `details` are extra members of the error object, such as the numbers behind a refusal.
    """

    status: ClassVar[int] = 500
    default_code: ClassVar[str] = "internal_error"
    type: ClassVar[str] = "api_error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or self.default_code
        self.param = param
        self.retry_after: int | None = None
        if retry_after is not None:
            self.retry_after = min(MAX_RETRY_AFTER, max(1, math.ceil(retry_after)))
        self.details = dict(details or {})


class BadRequest(CortexError):
    status = 400
    default_code = "invalid_request"
    type = "invalid_request_error"


class ContextTooLong(BadRequest):
    default_code = "context_length_exceeded"


class Unauthorized(CortexError):
    status = 401
    default_code = "invalid_api_key"
    type = "invalid_request_error"


class Forbidden(CortexError):
    status = 403
    default_code = "forbidden"
    type = "invalid_request_error"


class UnknownModel(CortexError):
    status = 404
    default_code = "model_not_found"
    type = "invalid_request_error"


class UnknownRoute(CortexError):
    status = 404
    default_code = "unknown_route"
    type = "invalid_request_error"


class MethodNotAllowed(CortexError):
    status = 405
    default_code = "method_not_allowed"
    type = "invalid_request_error"


class Conflict(CortexError):
    status = 409
    default_code = "conflict"
    type = "invalid_request_error"


class TooLarge(CortexError):
    status = 413
    default_code = "request_too_large"
    type = "invalid_request_error"


class OverLimit(CortexError):
    status = 429
    default_code = "rate_limit_exceeded"
    type = "rate_limit_error"


class Internal(CortexError):
    """Our own fault."""


class NodeLost(CortexError):
    """The node went away, or answered what no node may answer."""

    status = 502
    default_code = "node_lost"


class Busy(CortexError):
    status = 503
    default_code = "busy"


class NoCapacity(CortexError):
    status = 503
    default_code = "no_capacity"


class Loading(CortexError):
    status = 503
    default_code = "model_loading"


class LoadFailed(CortexError):
    status = 503
    default_code = "load_failed"


class UpstreamTimeout(CortexError):
    status = 504
    default_code = "upstream_timeout"


ERRORS: Final[tuple[type[CortexError], ...]] = (
    BadRequest,
    ContextTooLong,
    Unauthorized,
    Forbidden,
    UnknownModel,
    UnknownRoute,
    MethodNotAllowed,
    Conflict,
    TooLarge,
    OverLimit,
    Internal,
    NodeLost,
    Busy,
    NoCapacity,
    Loading,
    LoadFailed,
    UpstreamTimeout,
)

_BY_CODE: Final = {error.default_code: error for error in ERRORS}
_BY_STATUS: Final = {error.status: error for error in reversed(ERRORS)}


def to_object(error: CortexError) -> dict[str, Any]:
    """The canonical envelope: `{"error": {message, type, code, param, ...details}}`."""
    body = {"message": error.message, "type": error.type, "code": error.code, "param": error.param}
    return {"error": {**error.details, **body}}


def to_bytes(error: CortexError) -> bytes:
    return msgspec.json.encode(to_object(error))


def headers_of(error: CortexError) -> list[tuple[str, str]]:
    """Headers that go with the error whatever its dialect: `retry-after`, where waiting can help."""
    return [] if error.retry_after is None else [("retry-after", str(error.retry_after))]


def from_reply(status: int, body: bytes, retry_after: str | None = None) -> CortexError:
    """Read a refusal of another server back into the tree; never raises.

    The code decides the class, else the status, else a 4xx is a BadRequest and the rest NodeLost.
    An unreadable body becomes the message, cut at 300 characters, so that no cause is lost.
    """
    fields: dict[str, Any] = {}
    try:
        decoded = msgspec.json.decode(body)
        found = decoded.get("error") if isinstance(decoded, dict) else None
        fields = dict(found) if isinstance(found, dict) else {"message": found} if found else {}
    except msgspec.DecodeError:
        pass
    code = fields.pop("code", None)
    message = fields.pop("message", None) or body[:300].decode("utf-8", "replace") or "no message"
    param = fields.pop("param", None)
    fields.pop("type", None)
    kind = _BY_CODE.get(code) if isinstance(code, str) else None
    if kind is None or kind.status != status:
        kind = _BY_STATUS.get(status) or (BadRequest if 400 <= status < 500 else NodeLost)
    return kind(
        str(message),
        code=code if isinstance(code, str) else None,
        param=param if isinstance(param, str) else None,
        retry_after=float(retry_after) if retry_after and retry_after.isdecimal() else None,
        details=fields,
    )
