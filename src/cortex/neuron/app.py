"""The node's composition root: builds every part, starts and stops what runs beside the requests.

The only module of the node that reads the configuration. Importing it imports no torch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from cortex.config import ConfigError, NeuronConfig
from cortex.hookspecs import EngineFactory
from cortex.neuron import heap
from cortex.neuron.access import node_guard
from cortex.neuron.activation import Activator
from cortex.neuron.admission import Admission
from cortex.neuron.api import NodeApi
from cortex.neuron.chat_api import ChatApi
from cortex.neuron.hardware import CPU, Hardware
from cortex.neuron.hub import HubCache
from cortex.neuron.loading import Loader
from cortex.neuron.memory import MIB, Ledger, budget_of
from cortex.neuron.metrics import NeuronMetrics
from cortex.neuron.monitor import Monitor
from cortex.neuron.references import References
from cortex.neuron.residents import Residents, stopping
from cortex.neuron.torch_engine import CUDA_DTYPES, DTYPES, TorchFactory
from cortex.neuron.wheels import WheelCache
from cortex.plugins import EnginePlugins, load_engine_plugins
from cortex.web.idle import CallLater, Clock, loop_call_later
from cortex.web.service import Service
from cortex.wire.node import LoadRequest

CPU_FLOOR: Final = 1024 * MIB
"""Of the host's memory, left to everybody else."""
GPU_FLOOR: Final = 512 * MIB
DRAIN_S: Final = 5.0


class Neuron:
    """The assembled node. `app` is an ASGI application; `start` before it listens, `stop` after."""

    def __init__(
        self,
        app: Service,
        residents: Residents,
        factories: Mapping[str, EngineFactory],
        background: Callable[[], Mapping[str, Coroutine[Any, Any, None]]],
    ) -> None:
        self.app = app
        self._residents = residents
        self._factories = factories
        self._background = background
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Returns when models can be loaded; the default ones begin to, in the background.

        Raises CortexError if an engine cannot start.
        """
        heap.keep_to_one_arena()
        for factory in self._factories.values():
            await factory.start()
        for name, work in self._background().items():
            self._tasks.append(asyncio.create_task(work, name=name))

    def drain(self) -> None:
        """The end has begun: refuse what is new, let requests go on. `stop` comes when they have ended."""
        for task in self._tasks:
            task.cancel()
        self._residents.refuse_new()

    def cut(self) -> None:
        """End the requests that are under way, and tell their clients why."""
        self.app.cut(stopping())

    async def stop(self) -> None:
        """Refuse what is new, drain briefly, end every process. Also after a start that failed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._residents.stop(DRAIN_S)
        for factory in self._factories.values():
            await factory.stop()


def build_neuron(
    config: NeuronConfig,
    *,
    factories: Mapping[str, EngineFactory] | None = None,
    hardware: Hardware | None = None,
    clock: Clock = time.monotonic,
    call_later: CallLater = loop_call_later,
    wall: Callable[[], float] = time.time,
) -> Neuron:
    """`factories` stand in for the engines that are built in and installed, by name; the first one is for
    loads that name none.

    Raises ConfigError for values that mean nothing here, PluginError if an engine cannot be used,
    BadRequest if a default model names an engine that is not installed.
    """
    hardware = hardware or Hardware()
    _check_dtype(config.harness.torch.dtype, hardware)
    engines = _torch_first(load_engines(config).engines) if factories is None else factories
    metrics = NeuronMetrics()
    ledger = _ledger(config, hardware)
    residents = Residents(
        _loader(config, engines, ledger, hardware),
        defaults=_defaults(config),
        admission=partial(
            Admission,
            max_running=config.admission.max_running,
            max_waiting=config.admission.max_waiting,
            max_per_caller=config.admission.max_per_caller,
        ),
        on_loaded=metrics.loaded,
        on_step=metrics.step,
        on_freed=heap.trim,
        clock=clock,
        wall=wall,
    )
    activator = Activator(residents, [model.model_id for model in config.default_models])
    monitor = Monitor(hardware.read)
    api = NodeApi(
        residents=residents,
        chat=ChatApi(residents, metrics, clock=clock, wall=wall),
        hardware=hardware,
        monitor=monitor,
        ledger=ledger,
        activator=activator,
        metrics=metrics,
        harnesses=list(engines),
        clock=clock,
    )
    app = Service(
        api.routes(),
        name="neuron",
        clock=clock,
        call_later=call_later,
        body_cap=config.body_limit_mb * MIB,
        guard=node_guard(config.node_token),
    )
    return Neuron(app, residents, engines, lambda: {"monitor": monitor.run(), "activation": activator.run()})


def _loader(
    config: NeuronConfig, engines: Mapping[str, EngineFactory], ledger: Ledger, hardware: Hardware
) -> Loader:
    return Loader(
        factories=engines,
        locate=_references(config).locate,
        ledger=ledger,
        available=lambda: {uuid: reading.free_bytes for uuid, reading in hardware.read().items()},
        devices=[device.uuid for device in hardware.devices],
        threads=config.harness.torch.threads or hardware.cores,
        max_running=config.admission.max_running,
        max_wait_s=config.admission.max_wait_s or None,
        prefix_cache=config.prefix_cache.enabled,
        state_bytes=config.prefix_cache.state_mb * MIB,
    )


def _references(config: NeuronConfig) -> References:
    models_dir = Path(config.models_dir).expanduser().absolute()
    try:
        return References(models_dir, WheelCache(models_dir / "cache"), config.sources, HubCache())
    except ValueError as error:
        raise ConfigError(f"sources: {error}.") from None


def _defaults(config: NeuronConfig) -> list[LoadRequest]:
    return [msgspec.convert(msgspec.structs.asdict(model), LoadRequest) for model in config.default_models]


def load_engines(config: NeuronConfig) -> EnginePlugins:
    """The engines that plugins bring, and torch. Raises PluginError."""
    torch = config.harness.torch
    options = {
        "cuda_paged": torch.cuda_paged,
        "cuda_graphs": torch.cuda_graphs,
        "cuda_run_ahead": torch.cuda_run_ahead,
        "watchdog_s": torch.watchdog_s,
        "prompt_lookup": torch.prompt_lookup,
    }
    return load_engine_plugins(extra=[TorchFactory(dtype=torch.dtype, options=options)])


def _check_dtype(dtype: str | None, hardware: Hardware) -> None:
    """Raises ConfigError where no load without a dtype of its own could succeed."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"harness.torch.dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}.")
    if dtype in CUDA_DTYPES and not hardware.cuda.devices:
        raise ConfigError(f"harness.torch.dtype: {dtype} exists on GPUs only, of which this node has none.")


def _torch_first(engines: Mapping[str, EngineFactory]) -> dict[str, EngineFactory]:
    """The first engine is for loads that name none."""
    return {TorchFactory.name: engines[TorchFactory.name], **engines}


def _ledger(config: NeuronConfig, hardware: Hardware) -> Ledger:
    budgets = {
        uuid: budget_of(total, floor=CPU_FLOOR if uuid == CPU else GPU_FLOOR)
        for uuid, total in hardware.totals.items()
    }
    if config.memory_limit_mb is not None:
        limit = config.memory_limit_mb * MIB
        budgets = {uuid: min(limit, budget) for uuid, budget in budgets.items()}
    return Ledger(budgets)
