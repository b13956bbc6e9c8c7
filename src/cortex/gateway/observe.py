"""Hands events to the observers, and keeps the account of one request until it is settled.

Knows no metric names; an observer that fails is logged and harms nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final, Literal

from cortex.hookspecs import Kind, Observer, ObserverEvent, RequestEnded, RequestRetried, RequestStarted
from cortex.wire.chat import Peek, PeekUsage
from cortex.wire.errors import CortexError

log: Final = logging.getLogger("cortex.observe")

UNKNOWN_MODEL: Final = "unknown"
CLIENT_GONE: Final = 499
"""Nobody sees this status; nginx's number for it stands in the account."""
REFUSED_5XX: Final = frozenset({503})
"""Server-side statuses that mean "not now" and not "broken"."""

Outcome = Literal["ok", "refused", "failed", "client_gone"]


class Observers:
    def __init__(self, observers: Iterable[Observer] = ()) -> None:
        self._observers = tuple(observers)

    def emit(self, event: ObserverEvent) -> None:
        for observer in self._observers:
            try:
                observer.on_event(event)
            except Exception:
                log.exception("observer failed observer=%s event=%s", observer.name, type(event).__name__)


class Account:
    """What one request cost. Opened at arrival, settled exactly once."""

    def __init__(
        self,
        observers: Observers,
        clock: Callable[[], float],
        *,
        request_id: str,
        dialect: str,
        kind: Kind,
        arrived: float,
    ) -> None:
        self._observers = observers
        self._clock = clock
        self._request_id, self._dialect, self._kind = request_id, dialect, kind
        self._arrived = arrived
        self.model = UNKNOWN_MODEL
        self.node = ""
        self.streamed = False
        self._body_read: float | None = None
        self._overhead = 0.0
        self._on_node = False
        self._first_token: float | None = None
        self._last_token = 0.0
        self._token_events = 0
        self._usage: PeekUsage | None = None
        self._settled = False

    def body_read(self) -> None:
        self._body_read = self._clock()

    def dispatched(self, node: str) -> None:
        """The request goes to `node` now."""
        if self._body_read is not None:
            self._overhead, self._body_read = self._clock() - self._body_read, None
        self.node = node
        self._on_node = True
        self._observers.emit(
            RequestStarted(
                request_id=self._request_id,
                dialect=self._dialect,
                kind=self._kind,
                model=self.model,
                node=node,
            )
        )

    def retry(self, reason: str) -> None:
        """The node did not serve it; another one is tried."""
        self._on_node = False
        self._observers.emit(RequestRetried(model=self.model, node=self.node, reason=reason))

    def saw(self, peek: Peek) -> None:
        """One event of a stream."""
        if peek.carries_token:
            self._last_token = self._clock()
            self._token_events += 1
            if self._first_token is None:
                self._first_token = self._last_token
        self.saw_usage(peek)

    def saw_usage(self, peek: Peek) -> None:
        """A whole reply, or the part of an event that counts tokens."""
        if peek.usage is not None:
            self._usage = peek.usage

    def settle(self, outcome: Outcome, status: int) -> None:
        if self._settled:
            return
        self._settled = True
        self._observers.emit(self._ended(outcome, status))

    def settle_error(self, error: CortexError, *, sent: bool) -> None:
        """`sent`: the client has had part of the reply already, so nothing was refused."""
        refused = not sent and (error.status < 500 or error.status in REFUSED_5XX)
        self.settle("refused" if refused else "failed", error.status)

    def settle_cancelled(self, cut: CortexError | None) -> None:
        """Its work was ended: the server has `cut` it, else its client has left."""
        if cut is None:
            self.settle("client_gone", CLIENT_GONE)
        else:
            self.settle("failed", cut.status)

    def _ended(self, outcome: Outcome, status: int) -> RequestEnded:
        now = self._clock()
        usage = self._usage
        completion = self._token_events
        if usage is not None and usage.completion_tokens is not None:
            completion = usage.completion_tokens
        details = usage.prompt_tokens_details if usage else None
        first = self._first_token
        window = self._last_token - first if first is not None else now - self._arrived
        gap_count = self._token_events - 1
        counted = completion - 1 if first is not None else completion
        return RequestEnded(
            request_id=self._request_id,
            dialect=self._dialect,
            kind=self._kind,
            model=self.model,
            node=self.node,
            outcome=outcome,
            status=status,
            streamed=self.streamed,
            duration=now - self._arrived,
            overhead=self._overhead,
            time_to_first_token=first - self._arrived if first is not None else None,
            inter_token_latency=window / gap_count if first is not None and gap_count > 0 else None,
            tokens_per_second=counted / window if counted > 0 and window > 0 else None,
            prompt_tokens=(usage.prompt_tokens or 0) if usage else 0,
            completion_tokens=completion,
            cached_prompt_tokens=(details.cached_tokens or 0) if details else 0,
            started=self._on_node,
        )
