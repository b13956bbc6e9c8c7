"""The engine "torch": plans a load from a checkpoint's header, and runs the model in a worker process.

Imports no torch; that is the worker's. Knows sizes and messages, not how a model computes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from cortex import hookimpl
from cortex.hookspecs import Codec, EngineFactory, LoadedModel, LoadOrder, LoadPlan
from cortex.neuron.engine import entry
from cortex.neuron.engine.messages import Load, LoadProgress, LoadRefused, Ready, Report
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.processes import WarmServer
from cortex.neuron.text.codec import codec_from_directory, codec_from_gguf
from cortex.neuron.weights.checkpoint import Checkpoint, open_checkpoint
from cortex.neuron.worker_engine import WorkerEngine, WorkerModel
from cortex.neuron.worker_process import WorkerProcess
from cortex.wire.errors import BadRequest, LoadFailed
from cortex.wire.node import Limit, Progress

WORKER: Final = "cortex.neuron.engine.worker"
"""The module that the warm server imports, torch with it."""
CPU: Final = "cpu"
DTYPES: Final = ("packed16", "int8", "int4", "float32")
"""Forms of the weights; the first one is for loads that name none."""
QUANTS: Final = ("int8", "int4")
"""Those that a load may ask for as its `quant`, whatever the file holds."""
MIB: Final = 2**20
PROCESS_BYTES: Final = 384 * MIB
"""What a worker takes beside weights and cache: its own memory, and that of the step that it computes."""
MIN_CONTEXT: Final = 2048
"""Tokens. A shorter context than this, or than the model's own, is not worth a load."""
_ROUND: Final = 64
PREFILL_CHUNK: Final = 512


class _Detail(msgspec.Struct, frozen=True):
    """What the plan found out and the worker must know."""

    dtype: str
    cache_tokens: int
    options: Mapping[str, Any] = {}


class TorchFactory:
    """Loads models into worker processes. An instance is a plugin that registers itself."""

    name = "torch"

    def __init__(
        self,
        *,
        dtype: str | None = None,
        options: Mapping[str, Any] | None = None,
        warm: WarmServer | None = None,
    ) -> None:
        """`dtype` is for loads that name none; `options` go to every worker, under those of a load order."""
        self._dtype = dtype
        self._options = dict(options or {})
        self._warm = warm or WarmServer([WORKER], entry.main, probe=(CPU, 1))

    @hookimpl
    def cortex_register_engines(self, register: Callable[[EngineFactory], None]) -> None:
        register(self)

    def plan(self, order: LoadOrder) -> LoadPlan:
        """Reads the checkpoint's header.

        Without a budget: weights, a cache for two full contexts, and the process. With one, the cache
        takes what weights and process leave. Raises BadRequest for options that do not exist here and
        for a budget that is too small, LoadFailed for a checkpoint that cannot be run.
        """
        if len(order.devices) != 1:
            raise BadRequest("The torch engine runs a model on one device.", param="tensor_parallel")
        with open_checkpoint(Path(order.path)) as checkpoint:
            shape = read_shape(checkpoint)
            quant = (order.quant or "").lower()
            if quant not in QUANTS:
                check_quant(order.quant, checkpoint)
        dtype = order.dtype or (quant if quant in QUANTS else self._dtype) or DTYPES[0]
        if dtype not in DTYPES:
            raise BadRequest(f"There is no dtype {dtype!r}; it is {', '.join(DTYPES)}.", param="dtype")
        fixed = shape.weight_bytes(dtype) + PROCESS_BYTES
        if order.memory_bytes is None:
            cache_tokens = 2 * shape.max_position
            size = fixed + cache_tokens * shape.kv_bytes_per_token
        else:
            cache_tokens = _cache_within(order.memory_bytes - fixed, shape, order)
            size = order.memory_bytes
        context = min(shape.max_position, cache_tokens)
        return LoadPlan(
            order=order,
            bytes_per_device={order.devices[0]: size},
            limit=Limit(context=context, input=context, output=context),
            detail=_Detail(dtype, cache_tokens, self._options),
        )

    async def load(self, plan: LoadPlan, report: Callable[[Progress], None]) -> LoadedModel:
        """A running worker and the model's text side. Raises LoadFailed, also what the worker refused."""
        order = plan.order
        codec = await asyncio.to_thread(open_codec, Path(order.path))
        worker = await self._warm.spawn(order.devices[0], order.threads)
        try:
            reports = worker.reports()
            await _order_load(worker, plan)
            await _until_ready(worker, reports, report)
        except BaseException:
            await _to_its_end(worker.close())
            raise
        return WorkerModel(WorkerEngine(order.model_id, worker, reports), codec)

    async def start(self) -> None:
        await self._warm.start()

    async def stop(self) -> None:
        await self._warm.stop()


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Await `work` however often the caller is cancelled meanwhile: its memory counts until it is back."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.wait([task])
    task.result()


def open_codec(path: Path) -> Codec:
    """The tokenizer and template that come with a checkpoint. Raises LoadFailed."""
    if path.is_dir():
        return codec_from_directory(path)
    with open_checkpoint(path) as checkpoint:
        return codec_from_gguf(checkpoint.metadata)


def check_quant(quant: str | None, checkpoint: Checkpoint) -> None:
    """A quant only chooses among files: the file must be of that quantisation. Raises BadRequest."""
    if quant is None:
        return
    wanted = quant.lower().replace("-", "_")
    if checkpoint.kind == "gguf" and wanted in checkpoint.path.name.lower().replace("-", "_"):
        return
    types = {tensor.dtype.lower() for tensor in checkpoint.tensors.values()}
    if checkpoint.kind == "gguf" and wanted.removesuffix("_m").removesuffix("_s") in types:
        return
    raise BadRequest(
        f"{checkpoint.path.name} is not of the quantisation {quant!r}: it holds {', '.join(sorted(types))}, "
        f"and {' or '.join(QUANTS)} is all that can be made of it here. Leave quant out, or name a file "
        f"that has it.",
        param="quant",
    )


def _cache_within(room: int, shape: ModelShape, order: LoadOrder) -> int:
    """Tokens of cache that fit into `room` bytes. Raises BadRequest if that is no reasonable context."""
    tokens = max(0, room) // shape.kv_bytes_per_token
    least = min(MIN_CONTEXT, shape.max_position)
    if tokens < least:
        given = order.memory_bytes or 0
        needed = given - room + least * shape.kv_bytes_per_token
        raise BadRequest(
            f"{order.model_id} does not fit into {given // MIB:,} MB: weights and process take "
            f"{(given - room) // MIB:,} MB, and with a context of {least} tokens it takes "
            f"{-(-needed // MIB):,} MB. Give it more with memory_mb, or free the device.",
            param="memory_mb",
            details={"memory_bytes": given, "needed_bytes": needed},
        )
    return tokens if tokens < _ROUND else tokens // _ROUND * _ROUND


async def _order_load(worker: WorkerProcess, plan: LoadPlan) -> None:
    order, detail = plan.order, plan.detail
    try:
        await worker.send(
            Load(
                path=order.path,
                dtype=detail.dtype,
                device=order.devices[0],
                context=plan.limit.context,
                cache_tokens=detail.cache_tokens,
                prefill_chunk=PREFILL_CHUNK,
                threads=order.threads,
                max_running=order.max_running,
                max_wait_s=order.max_wait_s,
                prefix_cache=order.prefix_cache,
                options={**detail.options, **order.options},
            )
        )
    except OSError:
        raise LoadFailed(f"The worker for {order.model_id} {await worker.ended()}.") from None


async def _until_ready(
    worker: WorkerProcess, reports: AsyncIterator[Report], report: Callable[[Progress], None]
) -> None:
    """Pass the worker's progress on until it is ready. Raises LoadFailed if it never is."""
    try:
        async for said in reports:
            match said:
                case LoadProgress():
                    report(Progress(phase=said.phase, done=said.done, total=said.total))
                case LoadRefused():
                    raise LoadFailed(said.message, code=said.code)
                case Ready():
                    return
    except ValueError as error:
        raise LoadFailed(f"The worker sent what is {error}.") from None
    raise LoadFailed(f"The worker {await worker.ended()} while it loaded the model.")
