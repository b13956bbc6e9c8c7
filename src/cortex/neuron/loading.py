"""From a request to a running model: reference, path, devices, plan, grant, engine.

Holds the order of these steps and undoes them when one fails. Which models are wanted, and who waits
for them, is the business of `residents`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol

import msgspec

from cortex.hookspecs import EngineFactory, LoadedModel, LoadOrder, LoadPlan
from cortex.neuron.hardware import CPU
from cortex.neuron.memory import Ledger
from cortex.neuron.references import Report
from cortex.neuron.resident import Served
from cortex.neuron.thread_share import thread_share
from cortex.wire.errors import BadRequest
from cortex.wire.node import LoadRequest

_log: Final = logging.getLogger("cortex.neuron.loading")
MIB: Final = 2**20
MOST_RANKS: Final = 64
"""No model has heads for more, and the processor would try as many as are asked for."""
HOST_SHARE: Final = 8
"""Of the host's free memory, one part in so many is for what a model keeps there that runs elsewhere."""


class OffLoop(Protocol):
    """Runs a blocking function away from the event loop."""

    def __call__(self, function: Callable[..., Any], /, *arguments: Any) -> Awaitable[Any]: ...


class Loader:
    """Loads and closes models; the only one who asks the ledger."""

    def __init__(
        self,
        *,
        factories: Mapping[str, EngineFactory],
        locate: Callable[[str, Report, str | None], Awaitable[Path]],
        ledger: Ledger,
        available: Callable[[], Mapping[str, int]],
        devices: Sequence[str],
        threads: int,
        max_running: int = 8,
        max_wait_s: float | None = None,
        prefix_cache: bool = True,
        state_bytes: int = 2**30,
        off_loop: OffLoop = asyncio.to_thread,
    ) -> None:
        """`devices` are the uuids that a load gets which names none; `threads` all that models may use.
        `max_running`, `max_wait_s`, `prefix_cache` and `state_bytes` are for every model, see LoadOrder.

        `available` measures the bytes that are free on each device; it may block.
        """
        self._factories = factories
        self._locate = locate
        self._ledger = ledger
        self._available = available
        self._devices = tuple(devices)
        self._threads = threads
        self._max_running = max_running
        self._max_wait_s = max_wait_s
        self._prefix_cache = prefix_cache
        self._state_bytes = state_bytes
        self._running: dict[str, LoadedModel] = {}
        self._off_loop = off_loop

    async def load(self, request: LoadRequest, report: Report) -> Served:
        """Grants before anything starts; when cancelled or failing, everything is given back.

        Raises BadRequest, Forbidden, UnknownModel, Conflict (no room; shows the ledger), LoadFailed.
        """
        factory = self._factory(request.harness)
        path = await self._locate(request.source or request.model_id, report, request.quant)
        available = await self._off_loop(self._available)
        plan = await self._plan(factory, request, path, available)
        self._ledger.grant(request.model_id, plan.bytes_per_device, available)
        try:
            model = await factory.load(plan, report)
        except BaseException:
            self._ledger.release(request.model_id)
            raise
        self._running[request.model_id] = model
        self._share_threads()
        return Served(plan, model)

    async def close(self, served: Served) -> None:
        """End a model and give its memory back to the ledger."""
        model_id = served.plan.order.model_id
        try:
            await served.model.close()
        finally:
            self._ledger.release(model_id)
            del self._running[model_id]
            self._share_threads()

    def _share_threads(self) -> None:
        """Divide the threads evenly among the models that run; what is left over goes to the oldest."""
        for place, (model_id, model) in enumerate(self._running.items()):
            try:
                model.set_threads(thread_share(self._threads, place, len(self._running)))
            except Exception:  # of another model, most likely: this one runs
                _log.exception("threads not set model=%s", model_id)

    def harness(self, asked: str | None) -> str:
        """The name of the engine for a request. Raises BadRequest for one that is not installed."""
        return self._factory(asked).name

    def _factory(self, asked: str | None) -> EngineFactory:
        if not self._factories:
            raise BadRequest("This node has no engine installed.", param="harness")
        name = asked or next(iter(self._factories))
        if name not in self._factories:
            raise BadRequest(
                f"This node has no engine {name!r}; it has {', '.join(self._factories)}.", param="harness"
            )
        return self._factories[name]

    async def _plan(
        self, factory: EngineFactory, request: LoadRequest, path: Path, available: Mapping[str, int]
    ) -> LoadPlan:
        """What the factory proposes. A load that says no memory_mb and would not fit even into empty
        devices is planned again with all that they have.
        """
        devices = self._choose_devices(request)
        order = LoadOrder(
            model_id=request.model_id,
            path=str(path),
            quant=request.quant,
            dtype=request.dtype,
            tensor_parallel=len(devices),
            devices=devices,
            memory_bytes=None if request.memory_mb is None else request.memory_mb * MIB,
            threads=max(1, self._threads // (1 + len({grant.model_id for grant in self._ledger.grants}))),
            max_running=self._max_running,
            max_wait_s=self._max_wait_s,
            prefix_cache=self._prefix_cache,
            state_bytes=self._room_for_states(devices, available),
        )
        plan: LoadPlan = await self._off_loop(factory.plan, order)
        budget = min(self._ledger.budget(device) for device in devices)
        most = max((plan.bytes_per_device.get(device, 0) for device in devices), default=0)
        if order.memory_bytes is None and most > budget:
            plan = await self._off_loop(factory.plan, msgspec.structs.replace(order, memory_bytes=budget))
        return plan

    def _room_for_states(self, devices: Sequence[str], available: Mapping[str, int]) -> int:
        """Bytes on the host; of a model that runs there, the engine takes them out of its budget."""
        if CPU in devices or CPU not in self._ledger.devices:
            return self._state_bytes
        free = self._ledger.free(CPU)
        free = max(0, min(free, available.get(CPU, free)))
        return min(self._state_bytes, free // HOST_SHARE)

    def _choose_devices(self, request: LoadRequest) -> tuple[str, ...]:
        """A device a rank: those that a request names by uuid, index or `cpu`; else those with most room.

        A request that names devices and no number of ranks wants a rank on each.
        Each rank has a device of its own, but that the processor takes all ranks of a model, or none.
        """
        ranks = request.tensor_parallel or len(request.devices or ()) or 1
        if ranks > MOST_RANKS:
            raise BadRequest(f"tensor_parallel can be at most {MOST_RANKS}.", param="tensor_parallel")
        if request.devices is None:
            roomy = sorted(self._devices, key=self._ledger.free, reverse=True)
            if roomy == [CPU]:
                return (CPU,) * ranks
            if ranks > len(roomy):
                raise BadRequest(
                    f"This node has {len(roomy)} devices; tensor_parallel = {ranks} needs as many.",
                    param="tensor_parallel",
                )
            return tuple(roomy[:ranks])
        by_name = {device: device for device in (*self._devices, CPU)}
        by_name |= {str(index): device for index, device in enumerate(self._devices)}
        for name in request.devices:
            if name not in by_name:
                raise BadRequest(
                    f"This node has no device {name!r}; it has {', '.join(by_name)}.", param="devices"
                )
        chosen = tuple(by_name[name] for name in request.devices)
        if set(chosen) == {CPU} and len(chosen) in (1, ranks):
            return (CPU,) * ranks
        if CPU in chosen or len(set(chosen)) != ranks or len(chosen) != ranks:
            raise BadRequest(
                f"devices must name as many different devices as there are ranks ({ranks}), or {CPU} alone "
                f"for all of them.",
                param="devices",
            )
        return chosen
