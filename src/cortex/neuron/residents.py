"""The single owner of the models' states: loads that many wait for, leases, unloading, death, return.

Each model that is loaded has one task, its life: it loads, waits for the engine's death or an unload,
drains and closes, and alone moves the model's status meanwhile. Everybody else joins or asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterable
from functools import partial
from typing import Final

import msgspec

from cortex.hookspecs import EngineStep
from cortex.neuron.admission import Admission
from cortex.neuron.loading import Loader
from cortex.neuron.references import Report
from cortex.neuron.resident import Resident, Served
from cortex.neuron.shared_load import SharedLoad, ignore
from cortex.wire.errors import Busy, Conflict, CortexError, LoadFailed, NoCapacity, UnknownModel
from cortex.wire.node import QUANT_FORMS, FailedModel, LoadRequest, ModelLoad, ModelReport, Progress

_log: Final = logging.getLogger("cortex.neuron.residents")


class _Entry:
    """A resident and what runs for it."""

    def __init__(self, resident: Resident) -> None:
        self.resident = resident
        self.load: SharedLoad | None = None
        self.life: asyncio.Task[None] | None = None
        self.unload = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()


class Residents:
    """The models of a node."""

    def __init__(
        self,
        loader: Loader,
        *,
        defaults: Iterable[LoadRequest] = (),
        admission: Callable[[], Admission] = Admission,
        on_loaded: Callable[[str, float], None] = lambda model_id, seconds: None,
        on_step: Callable[[str, EngineStep], None] = lambda model_id, step: None,
        on_freed: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`admission` makes the line in front of a model; `on_step` is called for each step of an engine."""
        self._loader = loader
        self._admission = admission
        self._on_loaded = on_loaded
        self._on_step = on_step
        self._on_freed = on_freed
        self._clock = clock
        self._wall = wall
        self._stopping = False
        self._entries: dict[str, _Entry] = {}
        for request in defaults:
            self._add(request, configured=True)

    # --- what others see ---

    def reports(self) -> list[ModelReport]:
        return [entry.resident.report() for entry in self._entries.values()]

    def report(self, model_id: str) -> ModelReport | None:
        entry = self._entries.get(model_id)
        return entry.resident.report() if entry else None

    def loads(self) -> list[ModelLoad]:
        return [
            e.resident.load() for e in self._entries.values() if e.resident.status in ("loaded", "draining")
        ]

    def failed(self) -> list[FailedModel]:
        now = self._clock()
        failures = [entry.resident.failure(now=now) for entry in self._entries.values()]
        return [failure for failure in failures if failure is not None]

    def requests(self) -> list[str]:
        return [request for entry in self._entries.values() for request in entry.resident.requests]

    # --- what others ask for ---

    def expect(self, model_ids: Iterable[str]) -> None:
        """Somebody is going to load these default models, each in its turn: until then requests for one
        begin its load themselves.
        """
        for model_id in model_ids:
            self._entries[model_id].resident.pending = True

    async def ensure(self, request: LoadRequest, report: Report = ignore) -> ModelReport:
        """Returns when the model is loaded; one load serves all who ask meanwhile.

        A load that nobody waits for any more is cancelled. Raises what the load raised.
        """
        while True:
            self._refuse_when_stopping()
            entry = self._entries.get(request.model_id) or self._add(request, configured=False)
            resident = entry.resident
            if resident.status == "loaded":
                resident.hold(request.hold_s, now=self._clock())
                return resident.report()
            if await self._ending(entry):
                continue
            load = entry.load
            if load is None:
                resident.forget_failures()
                load = self._begin(entry, self._order(request, resident))
            loaded = await load.join(report)
            resident.hold(request.hold_s, now=self._clock())
            return loaded

    async def unload(self, model_id: str, *, if_idle: bool = False) -> None:
        """Returns when the model's memory is back. Requests in flight are let end first.

        Raises UnknownModel, or Conflict with the code `held` or `busy`.
        """
        entry = self._entries.get(model_id)
        if entry is None:
            raise self._unknown(model_id)
        resident = entry.resident
        resident.pending = False
        if resident.status in ("loading", "loaded"):
            resident.check_unload(if_idle=if_idle, now=self._clock())
        if entry.life is not None:
            if entry.load is not None:
                entry.load.abandon(
                    Conflict(f"The load of {model_id} was ended by an unload.", code="unloaded")
                )
            entry.unload.set()
            await asyncio.wait([entry.life])
        if resident.status == "failed" and entry.life is None:
            resident.move("unloaded")
            self._forget_stranger(resident)

    @contextlib.asynccontextmanager
    async def lease(
        self, model_id: str, request_id: str, *, caller: str = "", places: int = 1
    ) -> AsyncIterator[Served]:
        """The model, for one request of `caller` with `places` sequences, for as long as the context lasts.

        A model that is loading is waited for; a default model whose turn at start has not come is loaded
        now; one that failed is loaded again, after a rest that grows.
        Raises UnknownModel, OverLimit, Busy, BadRequest (for `places`), LoadFailed, NoCapacity.
        """
        self._refuse_when_stopping()
        entry = self._entries.get(model_id)
        if entry is None or entry.resident.outward == "unloaded":
            raise self._unknown(model_id)
        resident = entry.resident
        token = object()
        resident.enter(token, request_id, caller, places)
        entry.idle.clear()
        try:
            yield await self._serve(entry)
        finally:
            resident.leave(token, wall=self._wall())
            if not resident.requests:
                entry.idle.set()

    def refuse_new(self) -> None:
        """Requests and loads that come from now on are refused; those that are here go on."""
        self._stopping = True

    async def stop(self, drain_s: float = 0.0) -> None:
        """Refuse what is new, give requests `drain_s` seconds to end, then end every model."""
        self.refuse_new()
        lives = {entry.life for entry in self._entries.values() if entry.life is not None}
        for entry in self._entries.values():
            if entry.load is not None:
                entry.load.abandon(stopping())
            entry.unload.set()
        if lives and drain_s > 0:
            _, lives = await asyncio.wait(lives, timeout=drain_s)
        for entry in self._entries.values():
            entry.idle.set()
        if lives:
            await asyncio.wait(lives)

    # --- inside ---

    def _add(self, request: LoadRequest, *, configured: bool) -> _Entry:
        request = msgspec.structs.replace(request, harness=self._loader.harness(request.harness))
        resident = Resident(request, self._admission(), configured=configured)
        entry = self._entries[request.model_id] = _Entry(resident)
        return entry

    def _order(self, request: LoadRequest, resident: Resident) -> LoadRequest:
        """What to load the model by. Of one that never was one here, nothing is known but what orders said
        that failed: the newest one counts, and a request that tries again goes by it.
        """
        if resident.is_stranger:
            harness = self._loader.harness(request.harness)
            resident.request = msgspec.structs.replace(request, harness=harness)
        return _merged(request, resident.request)

    def _begin(self, entry: _Entry, request: LoadRequest) -> SharedLoad:
        """Load the model by `request`, which is what is known of it from when that has succeeded."""
        resident = entry.resident
        failure = resident.error if resident.status == "failed" else None

        def tell(progress: Progress) -> None:
            resident.progress = progress
            load.tell(progress)

        task = asyncio.create_task(self._load(resident, request, tell))
        load = entry.load = SharedLoad(request, task, self._clock())
        entry.unload.clear()
        resident.move("loading")
        entry.life = asyncio.create_task(
            self._live(entry, load, failure), name=f"life of {resident.model_id}"
        )
        return load

    async def _load(self, resident: Resident, request: LoadRequest, tell: Report) -> Served:
        """A model that runs and is watched. One that cannot be watched is ended: nobody would see it."""
        served = await self._loader.load(request, tell)
        try:
            served.model.watch(partial(self._stepped, resident, served))
        except Exception:
            await self._loader.close(served)
            raise
        return served

    async def _ending(self, entry: _Entry) -> bool:
        """True after a wait, if a load or a life of the model was ending: look again what it is now."""
        if entry.load is not None:
            if entry.load.abandoned:
                await entry.load.settled.wait()
                return True
        elif entry.life is not None:
            await asyncio.wait([entry.life])
            return True
        return False

    async def _serve(self, entry: _Entry) -> Served:
        """The running model behind `entry`, waited for or brought back if need be."""
        resident = entry.resident
        while resident.status != "loaded" or resident.served is None:
            self._refuse_when_stopping()
            if resident.outward == "unloaded":
                raise self._unknown(resident.model_id)
            if resident.status == "draining":
                raise Busy(f"{resident.model_id} is being unloaded.", code="draining", retry_after=1)
            if await self._ending(entry):
                continue
            if entry.load is None:
                resident.check_retry(now=self._clock())
            try:
                await (entry.load or self._begin(entry, resident.request)).join(ignore)
            except Conflict as error:
                raise NoCapacity(error.message, code=error.code, details=error.details) from error
        return resident.served

    async def _live(self, entry: _Entry, load: SharedLoad, failure: CortexError | None) -> None:
        """The life of a model from its load to its end; `failure` is what ended the one before it."""
        await asyncio.wait([load.task])
        served = self._settle(entry.resident, load, failure)
        entry.load = None
        load.settled.set()
        if served is not None:
            await self._run(entry, served)
        entry.life = None
        self._forget_stranger(entry.resident)
        # After this task, which still holds the model; before those who wait for its end.
        asyncio.get_running_loop().call_soon(self._on_freed)

    def _settle(self, resident: Resident, load: SharedLoad, failure: CortexError | None) -> Served | None:
        """Turn a load's end into the model's status, and tell those who wait."""
        if load.task.cancelled():
            resident.as_before(failure)
            load.fail(Conflict(f"The load of {resident.model_id} was ended.", code="unloaded"))
            return None
        error = load.task.exception()
        if error is None:
            seconds = self._clock() - load.started
            served = load.task.result()
            resident.request = load.request
            resident.loaded(served, now=self._clock(), wall=self._wall(), seconds=seconds)
            self._on_loaded(resident.model_id, seconds)
            _log.info("loaded model=%s seconds=%.1f", resident.model_id, seconds)
            load.succeed(resident.report())
            return served
        if not isinstance(error, CortexError):
            _log.error("engine failed model=%s", resident.model_id, exc_info=error)
            error = LoadFailed(f"The engine {load.request.harness} failed: {error!r}.")
        _log.warning("not loaded model=%s error=%s", resident.model_id, error.message)
        if error.status < 500 and not resident.configured:
            resident.as_before(failure)
        else:
            resident.failed(error, now=self._clock())
        load.fail(error)
        return None

    def _stepped(self, resident: Resident, served: Served, step: EngineStep) -> None:
        if resident.served is served:  # not the last words of an engine that is gone
            resident.step = step
            self._on_step(resident.model_id, step)

    async def _run(self, entry: _Entry, served: Served) -> None:
        """From loaded until all memory is back."""
        resident = entry.resident
        died = asyncio.ensure_future(served.model.died())
        asked = asyncio.ensure_future(entry.unload.wait())
        await asyncio.wait([died, asked], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if entry.unload.is_set():
            resident.move("draining")
            idle = asyncio.ensure_future(entry.idle.wait())
            await asyncio.wait([died, idle], return_when=asyncio.FIRST_COMPLETED)
            idle.cancel()
        else:
            reason = f"failed: {died.exception()!r}" if died.exception() else died.result()
            _log.error("engine ended model=%s how=%s", resident.model_id, reason)
            resident.failed(LoadFailed(f"Its engine {reason}."), now=self._clock())
        died.cancel()
        await asyncio.gather(died, asked, return_exceptions=True)
        resident.served = None
        try:
            await self._loader.close(served)
        except Exception:
            _log.exception("engine not closed well model=%s", resident.model_id)
        if resident.status == "draining":
            resident.move("unloaded")
            _log.info("unloaded model=%s", resident.model_id)

    def _forget_stranger(self, resident: Resident) -> None:
        """Keep no record of a name that was never a model here."""
        if resident.status == "unloaded" and resident.is_stranger:
            self._entries.pop(resident.model_id, None)

    def _refuse_when_stopping(self) -> None:
        if self._stopping:
            raise stopping()

    def _unknown(self, model_id: str) -> UnknownModel:
        known = [entry.resident for entry in self._entries.values()]
        listed = [
            f"{words}: {', '.join(names)}"
            for words, statuses in _IN_WORDS.items()
            if (names := [resident.model_id for resident in known if resident.outward in statuses])
        ]
        return UnknownModel(
            f"{model_id!r} is not loaded on this node ({'; '.join(listed) or 'nothing is'}). "
            f"POST /models/load loads a model.",
            param="model",
        )


_IN_WORDS: Final = {
    "loaded": ("loaded", "draining"),
    "loading": ("loading",),
    "failed": ("failed",),
    "can be loaded": ("unloaded",),
}


def _is_form(quant: str | None) -> bool:
    return quant is not None and quant.lower() in QUANT_FORMS


def stopping() -> Busy:
    return Busy("This node is stopping.", code="stopping", retry_after=15)


def _merged(request: LoadRequest, known: LoadRequest) -> LoadRequest:
    """What a request says, and where it says nothing what is known of the model.

    Of two fields that say the same in two ways, one that is said replaces what is known of the other.
    """
    said = {name: value for name, value in msgspec.structs.asdict(request).items() if value is not None}
    if "devices" in said or "tensor_parallel" in said:
        said = {"devices": None, "tensor_parallel": None, **said}
    if _is_form(request.quant):
        said = {"dtype": None, **said}
    elif request.dtype is not None and _is_form(known.quant):
        said = {"quant": None, **said}
    return msgspec.structs.replace(known, **said)
