"""The one log line of a request: `key=value`, greppable, safe against whatever a client sent.

Logger `cortex.access.<service>`, level INFO, or DEBUG for polls that go well. Does not know
what the extra fields mean.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Final

from cortex.web.asgi import Request

_PLAIN: Final = re.compile(r"[^\s\"=\\\x00-\x1f\x7f-\U0010ffff]+")
MAX_VALUE: Final = 200


class AccessLog:
    def __init__(self, service: str) -> None:
        self._logger = logging.getLogger(f"cortex.access.{service}")

    def request(self, request: Request, *, status: int, sent: int, seconds: float, outcome: str) -> None:
        """`sent` counts the bytes of the reply's body; `status` 0 means that no reply was begun."""
        level = logging.DEBUG if request.routine and outcome == "ok" else logging.INFO
        if not self._logger.isEnabledFor(level):
            return
        fields: dict[str, object] = {
            "method": request.method,
            "path": request.path,
            "status": status,
            "bytes": sent,
            "duration": f"{seconds:.4f}",
            "id": request.id,
            "outcome": outcome,
            **request.log,
        }
        # Made here, because finding out which line of code logs costs more than all the rest.
        self._logger.handle(
            logging.LogRecord(self._logger.name, level, __file__, 0, line(fields), None, None)
        )


def line(fields: dict[str, object]) -> str:
    """`key=value` separated by spaces; a value that is not plain is a JSON string of ASCII."""
    return " ".join(f"{name}={_value(value)}" for name, value in fields.items())


def _value(value: object) -> str:
    if type(value) is int:
        return str(value)
    if isinstance(value, float):
        return f"{value:.4f}"
    text = str(value)
    if len(text) > MAX_VALUE:
        text = text[:MAX_VALUE] + "..."
    return text if _PLAIN.fullmatch(text) else json.dumps(text)
