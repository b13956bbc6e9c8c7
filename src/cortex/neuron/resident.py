"""One model on this node: its status, who uses it, and what may be said of it.

Plain state that `residents`, its owner, changes; nothing here waits or starts anything. Times come from
the owner: `now` is in seconds of a monotonic clock, `wall` in seconds since the epoch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

import msgspec

from cortex.hookspecs import EngineStep, LoadedModel, LoadPlan
from cortex.neuron.admission import Admission
from cortex.wire.errors import Conflict, CortexError, LoadFailed
from cortex.wire.node import FailedModel, LoadRequest, ModelLoad, ModelReport, Progress, Servable, Status

MIB: Final = 2**20
MAX_BACKOFF_S: Final = 60.0
STEADY_S: Final = 60.0
"""A model that ran so long before it died counts as sound."""

TRANSITIONS: Final[Mapping[Status, frozenset[Status]]] = {
    "unloaded": frozenset({"loading"}),
    "loading": frozenset({"loaded", "failed", "unloaded"}),
    "loaded": frozenset({"draining", "failed"}),
    "draining": frozenset({"unloaded"}),
    "failed": frozenset({"loading", "unloaded"}),
}


class Served(msgspec.Struct, frozen=True):
    """A model that runs, with the plan by which it was loaded."""

    plan: LoadPlan
    model: LoadedModel


class _Guest(msgspec.Struct, frozen=True):
    """A request that uses the model or waits for it, and the places that it has in line."""

    request_id: str
    caller: str
    places: int


class Resident:
    """What the node knows of one model, loaded or not."""

    def __init__(self, request: LoadRequest, admission: Admission, *, configured: bool) -> None:
        self.request = request
        """What is known of it: as it was loaded last, or as it is configured."""
        self.admission = admission
        self.configured = configured
        """One of the node's default models, which is known whatever becomes of it."""
        self.pending = False
        """Its load is expected: requests wait for it as for one that is loading."""
        self.was_loaded = False
        self.served: Served | None = None
        self.step: EngineStep | None = None
        """The last one that the running engine has told of."""
        self.error: CortexError | None = None
        self.progress: Progress | None = None
        self.load_seconds: float | None = None
        self._status: Status = "unloaded"
        self._loaded_at: float | None = None
        self._loaded_wall: float | None = None
        self._last_used_wall: float | None = None
        self._held_until = 0.0
        self._retry_at = 0.0
        self._failures = 0
        self._guests: dict[object, _Guest] = {}

    @property
    def model_id(self) -> str:
        return self.request.model_id

    @property
    def status(self) -> Status:
        return self._status

    @property
    def outward(self) -> Status:
        """The status as others see it: who asks for what is pending waits for a load."""
        return "loading" if self.pending and self._status == "unloaded" else self._status

    @property
    def is_stranger(self) -> bool:
        """A name that was never a model here, only asked for."""
        return not (self.configured or self.was_loaded)

    @property
    def requests(self) -> list[str]:
        """Ids of the requests that use the model or wait for it."""
        return [guest.request_id for guest in self._guests.values()]

    # --- changes ---

    def move(self, status: Status) -> None:
        if status not in TRANSITIONS[self._status]:
            raise ValueError(f"{self.model_id} cannot go from {self._status} to {status}")
        self._status = status
        if status != "loading":
            self.progress = None
        if status != "failed":
            self.error = None

    def loaded(self, served: Served, *, now: float, wall: float, seconds: float) -> None:
        self.move("loaded")
        self.pending = False
        self.served = served
        self.step = None
        self.was_loaded = True
        self.load_seconds = seconds
        self._loaded_at = now
        self._loaded_wall = self._last_used_wall = wall

    def failed(self, error: CortexError, *, now: float) -> None:
        """The load failed, or the engine died. Each further failure doubles the wait before a request may
        try again; the first death of a model that ran is forgiven at once.
        """
        died = self._status == "loaded"
        if died and self._loaded_at is not None and now - self._loaded_at >= STEADY_S:
            self._failures = 0
        self._failures += 1
        wait = 0.0 if died and self._failures == 1 else min(MAX_BACKOFF_S, 2.0 ** (self._failures - 1))
        self._retry_at = now + wait
        self.move("failed")
        self.pending = False
        self.error = error

    def as_before(self, error: CortexError | None) -> None:
        """A load came to nothing that counts: the model is again what it was, failed with `error` or not."""
        self.move("unloaded" if error is None else "failed")
        self.error = error

    def forget_failures(self) -> None:
        """Somebody asked for the model by name: what was, is no reason to wait."""
        self._failures = 0
        self._retry_at = 0.0

    def hold(self, seconds: float | None, *, now: float) -> None:
        """Refuse to unload for so long from now."""
        if seconds is not None:
            self._held_until = max(self._held_until, now + seconds)

    def enter(self, token: object, request_id: str, caller: str, places: int) -> None:
        """A request comes in; `token` is its own. Raises what `Admission.enter` raises."""
        self.admission.enter(self.model_id, caller, places)
        self._guests[token] = _Guest(request_id, caller, places)

    def leave(self, token: object, *, wall: float) -> None:
        guest = self._guests.pop(token)
        self.admission.leave(guest.caller, guest.places)
        self._last_used_wall = wall

    # --- questions ---

    def check_retry(self, *, now: float) -> None:
        """Raises LoadFailed while a failed model rests before it is loaded again."""
        wait = self._rest(now)
        if wait > 0:
            cause = self.error.message if self.error else "It failed."
            raise LoadFailed(
                f"{self.model_id} failed: {cause} A request in {math.ceil(wait)} s or later loads it again.",
                retry_after=wait,
            )

    def check_unload(self, *, if_idle: bool, now: float) -> None:
        """Raises Conflict if the model is held, or in use and to be unloaded only when idle."""
        wait = self._held_until - now
        if wait > 0:
            raise Conflict(
                f"{self.model_id} was loaded just now and is held for another {wait:.0f} s.",
                code="held",
                retry_after=wait,
                details={"held_s": round(wait, 3)},
            )
        if if_idle and (self._guests or self._status == "loading"):
            in_flight = len(self._guests)
            doing = "is loading" if self._status == "loading" else f"has {in_flight} requests in flight"
            raise Conflict(f"{self.model_id} {doing}.", code="busy", details={"in_flight": in_flight})

    def load(self) -> ModelLoad:
        waiting = self._waiting()
        return ModelLoad(
            id=self.model_id,
            in_flight=self.admission.present - waiting,
            queue_depth=waiting,
            max_in_flight=self.admission.max_running,
            max_queue_depth=self.admission.max_waiting,
            cache_usage_ratio=self._cache_usage(),
        )

    def _waiting(self) -> int:
        """The engine knows better than a count who waits, as long as it makes steps; what it said last
        before it fell idle, or before everybody left, does not count.
        """
        if self.step is None or self.step.running == 0:
            return self.admission.waiting
        return min(self.step.waiting, self.admission.present)

    def _cache_usage(self) -> float | None:
        """None before the first step. Nobody who is gone holds anything, whatever the last step told."""
        if self.step is None or self.step.cache_total_tokens <= 0:
            return None
        if not self.admission.present:
            return 0.0
        return self.step.cache_used_tokens / self.step.cache_total_tokens

    def failure(self, *, now: float) -> FailedModel | None:
        """Why the model failed and when a request may load it again; None if it has not failed."""
        if self._status != "failed":
            return None
        detail = self.error.message if self.error else ""
        return FailedModel(id=self.model_id, detail=detail, retry_in_s=round(self._rest(now), 3))

    def _rest(self, now: float) -> float:
        """Seconds from now in which no request loads the model again."""
        return max(0.0, self._retry_at - now)

    def report(self) -> ModelReport:
        report = ModelReport(
            id=self.model_id,
            harness=self.request.harness or "",
            status=self.outward,
            in_flight=len(self._guests),
            load_seconds=self.load_seconds,
            last_used=self._last_used_wall,
            servable=self._servable(),
            progress=self.progress,
        )
        if self.served is not None:
            plan = self.served.plan
            report.loaded_at = self._loaded_wall
            sizes = plan.bytes_per_device
            report.devices = [device for device in sizes if device in plan.order.devices]
            report.bytes_per_device = dict(sizes)
            report.vram_used_mb = sum(sizes[device] for device in report.devices) // MIB
            report.capabilities = list(plan.capabilities)
            report.limit = plan.limit
            report.tool_call = plan.tool_call
            report.reasoning = plan.reasoning
        return report

    def _servable(self) -> Servable:
        if self._status == "loaded":
            return Servable()
        detail = self.error.message if self.error else None
        return Servable(ok=False, reason=self.outward, detail=detail)
