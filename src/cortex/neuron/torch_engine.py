"""The engine "torch": plans a load from a checkpoint's header, and runs the model in a worker process.

Imports no torch; that is the worker's. Knows sizes and messages, not how a model computes.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from cortex import hookimpl
from cortex.hookspecs import Codec, EngineFactory, LoadedModel, LoadOrder, LoadPlan
from cortex.neuron.engine import entry
from cortex.neuron.engine.messages import WATCHDOG_S, Load, has_pages
from cortex.neuron.hub_files import is_of, name_of
from cortex.neuron.models.division import indivisible, largest_share, rank_weight_bytes
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.processes import WarmServer, to_its_end
from cortex.neuron.rank_group import RankGroup
from cortex.neuron.text.codec import codec_from_directory, codec_from_gguf
from cortex.neuron.weights.checkpoint import Checkpoint, open_checkpoint
from cortex.neuron.worker_engine import WorkerEngine, WorkerModel
from cortex.wire.errors import BadRequest
from cortex.wire.node import QUANT_FORMS, Limit, Progress

WORKER: Final = "cortex.neuron.engine.worker"
"""The module that the warm server imports, torch with it."""
CPU: Final = "cpu"
DTYPES: Final = ("packed16", "int8", "int4", "float32")
"""Forms of the weights; the first one is for loads that name none."""
CUDA_DTYPES: Final = ("int4",)
MIB: Final = 2**20
PROCESS_BYTES: Final = 384 * MIB
"""What a worker takes beside weights and cache: its own memory, and that of the step that it computes."""
MIN_CONTEXT: Final = 2048
"""Tokens. A shorter context than this, or than the model's own, is not worth a load."""
_ROUND: Final = 64
STATES_SHARE: Final = 8
"""Of a budget, one part in so many is for states that are kept."""
PREFILL_CHUNK: Final = 512
SAVES: Final = 1.5
"""Layers with a window keep only that where a budget is good for so many times the tokens then, or where
without one the cache takes that much less: with all rows kept, a prompt goes on from any known token."""
WINDOWS_EACH: Final = 4
"""Windows that are kept on the host, at most, for each sequence that may run."""
PATIENCE: Final = 10
"""A step of ranks may take so many times as long as one of their waits for each other, which the watchdog
limits."""


class _Detail(msgspec.Struct, frozen=True):
    """What the plan found out and the worker must know."""

    dtype: str
    cache_tokens: int
    checkpoints: int
    windowed: bool
    options: Mapping[str, Any] = {}


class _Sizes(NamedTuple):
    """Bytes of a rank: of each token in the cache, each slot that a sequence runs in, and each checkpoint."""

    token: int
    slot: int
    checkpoint: int

    @classmethod
    def of(cls, share: ModelShape, *, windowed: bool) -> _Sizes:
        """`windowed`: layers with a window keep that only."""
        token, state = share.kv_bytes_per_token, share.state_bytes
        if not windowed:
            return cls(token, state, state)
        near, window = share.near_bytes_per_token, share.window or 0
        return cls(token - near, state + near * (window + PREFILL_CHUNK), state + near * window)


class _Room(NamedTuple):
    """Tokens that the cache holds, checkpoints that there are, and bytes of a rank: `held` by slots and
    checkpoints, `fixed` with weights and process too. `needed` are a device's with the shortest context."""

    sizes: _Sizes
    tokens: int
    checkpoints: int
    held: int
    fixed: int
    needed: int


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
        takes what weights and process leave. Layers with a window keep only that where it is worth it. Of
        several ranks each has its share of weights and cache and a process; those on the same device share
        its budget. States that are kept lie on the host, also of what runs elsewhere. Raises BadRequest for
        options that do not exist here, for a budget that is too small and for ranks that cannot divide the
        model, LoadFailed for a checkpoint that cannot be run.
        """
        ranks = len(order.devices)
        with open_checkpoint(Path(order.path)) as checkpoint:
            shape = read_shape(checkpoint)
            dtype = self._form(order, checkpoint)
        hindrance = indivisible(shape, ranks)
        if hindrance is not None:
            raise BadRequest(f"{order.model_id}: {hindrance}", param="tensor_parallel")
        share = largest_share(shape, ranks)
        weights = rank_weight_bytes(shape, ranks, dtype, packs=order.devices[0] == CPU)
        options = {**self._options, **order.options}
        room = _room(order, share, weights, windowed=False)
        windowed = False
        if share.sliding_layers and not has_pages(order.devices[0], options):  # which keep all rows
            near = _room(order, share, weights, windowed=True)
            windowed = _is_better(near, room, order, share)
            room = near if windowed else room
        together = _together(order)
        if order.memory_bytes is None:
            size = together * (room.fixed + room.tokens * room.sizes.token)
        else:
            _check_room(room, share, order)
            size = order.memory_bytes
        bytes_per_device = dict.fromkeys(order.devices, size)
        if room.checkpoints and order.devices[0] != CPU:
            bytes_per_device[CPU] = ranks * room.checkpoints * room.sizes.checkpoint
        context = min(shape.max_position, room.tokens)
        return LoadPlan(
            order=order,
            bytes_per_device=bytes_per_device,
            limit=Limit(context=context, input=context, output=context),
            detail=_Detail(dtype, room.tokens, room.checkpoints, windowed, options),
        )

    def _form(self, order: LoadOrder, checkpoint: Checkpoint) -> str:
        """How the weights are to be held, one of DTYPES. Raises BadRequest."""
        quant = (order.quant or "").lower()
        if quant not in QUANT_FORMS:
            check_quant(order.quant, checkpoint)
            dtype = order.dtype or self._dtype or DTYPES[0]
        elif order.dtype in (None, quant):
            dtype = quant
        else:
            raise BadRequest(
                f"quant = {order.quant!r} and dtype = {order.dtype!r} contradict each other: both say how "
                f"the weights are held. Give one of them.",
                param="quant",
            )
        if dtype not in DTYPES:
            raise BadRequest(f"There is no dtype {dtype!r}; it is {', '.join(DTYPES)}.", param="dtype")
        if dtype in CUDA_DTYPES and CPU in order.devices:
            raise BadRequest(
                f"The form {dtype} exists on GPUs only, and {order.model_id} would run on the processor; ask "
                f"for int8 or packed16 as its dtype.",
                param="quant" if quant == dtype else "dtype",
            )
        return dtype

    async def load(self, plan: LoadPlan, report: Callable[[Progress], None]) -> LoadedModel:
        """Running workers and the model's text side. Raises LoadFailed, also what a worker refused."""
        order = plan.order
        ranks = await RankGroup.start(self._warm, order.devices, order.threads)
        try:
            codec = await _beside(
                ranks.load(_order(plan), order.devices, report),
                asyncio.to_thread(open_codec, Path(order.path)),
            )
        except BaseException:
            await to_its_end(ranks.close())
            raise
        patience_s = None
        if len(order.devices) > 1:  # a single worker waits for nobody
            patience_s = PATIENCE * plan.detail.options.get("watchdog_s", WATCHDOG_S)
        engine = WorkerEngine(order.model_id, ranks, ranks.reports, patience_s=patience_s)
        return WorkerModel(engine, codec)

    async def start(self) -> None:
        await self._warm.start()

    async def stop(self) -> None:
        await self._warm.stop()


async def _beside(load: Coroutine[Any, Any, None], reading: Coroutine[Any, Any, Codec]) -> Codec:
    """What is read, once the load is done too. As soon as one of them fails nobody waits for the other."""
    tasks = asyncio.ensure_future(load), asyncio.ensure_future(reading)
    try:
        _, codec = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return codec


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
    name = checkpoint.path.name.lower().replace("-", "_")
    if checkpoint.kind == "gguf" and re.search(rf"(?<![a-z0-9]){re.escape(wanted)}(?![a-z0-9])", name):
        return
    if checkpoint.kind == "gguf" and is_of(name_of(checkpoint.path), quant):  # as the hub chose it
        return
    types = {tensor.dtype.lower() for tensor in checkpoint.tensors.values()}
    if checkpoint.kind == "gguf" and wanted.removesuffix("_m").removesuffix("_s") in types:
        return
    raise BadRequest(
        f"{checkpoint.path.name} is not of the quantisation {quant!r}: it holds {', '.join(sorted(types))}, "
        f"and {' or '.join(QUANT_FORMS)} is all that can be made of it here. Leave quant out, or name a file "
        f"that has it.",
        param="quant",
    )


def _together(order: LoadOrder) -> int:
    """Ranks on the device that has most of them."""
    return max(order.devices.count(device) for device in order.devices)


def _room(order: LoadOrder, share: ModelShape, weights: int, *, windowed: bool) -> _Room:
    """What there is to have beside so many bytes of weights: within the budget, or without one a cache for
    two full contexts. Tokens may be too few. `windowed`: layers with a window keep that only.
    """
    sizes = _Sizes.of(share, windowed=windowed)
    together, most = _together(order), 2 * share.max_position
    before = weights + PROCESS_BYTES
    least = _least_context(share) * sizes.token
    slots = order.max_running * sizes.slot
    checkpoints = _checkpoints(order, sizes.checkpoint, together * (before + slots + least))
    if windowed:
        checkpoints = min(checkpoints, WINDOWS_EACH * order.max_running)
    held = slots + (checkpoints * sizes.checkpoint if order.devices[0] == CPU else 0)
    fixed = before + held
    tokens = most
    if order.memory_bytes is not None:
        left = order.memory_bytes // together - fixed
        # Where no layer attends to everything, a token in the cache takes nothing.
        tokens = max(0, left) // sizes.token if sizes.token else most * (left >= 0)
        tokens = tokens if tokens < _ROUND else tokens // _ROUND * _ROUND
    return _Room(sizes, tokens, checkpoints, held, fixed, together * (fixed + least))


def _is_better(near: _Room, plain: _Room, order: LoadOrder, share: ModelShape) -> bool:
    """Whether layers with a window should keep that only: not where all who run have room for all rows."""
    if order.memory_bytes is None:
        taken = [room.held + room.tokens * room.sizes.token for room in (near, plain)]
        return taken[0] * SAVES <= taken[1]
    least = _least_context(share)
    if max(near.tokens, plain.tokens) < least:
        return near.needed < plain.needed
    if plain.tokens < least:
        return True
    has_room_for_all = plain.tokens >= order.max_running * share.max_position
    return not has_room_for_all and near.tokens >= SAVES * plain.tokens


def _check_room(room: _Room, share: ModelShape, order: LoadOrder) -> None:
    """Raises BadRequest if the budget leaves no reasonable context."""
    least, together, budget = _least_context(share), _together(order), order.memory_bytes or 0
    if room.tokens < least:
        raise BadRequest(
            f"{order.model_id} does not fit into {budget // MIB:,} MB: weights and process take "
            f"{together * room.fixed // MIB:,} MB, and with a context of {least} tokens it takes "
            f"{-(-room.needed // MIB):,} MB. Give it more with memory_mb, or free the device.",
            param="memory_mb",
            details={"memory_bytes": budget, "needed_bytes": room.needed},
        )


def _least_context(share: ModelShape) -> int:
    """Tokens of the shortest context that is worth a load."""
    return min(MIN_CONTEXT, share.max_position)


def _checkpoints(order: LoadOrder, each: int, needed: int) -> int:
    """How many of `each` bytes fit into what the order allows for them, on all ranks together. Of the host's
    budget for a model that runs there, they get their share, less where the model has not the `needed` bytes
    else.
    """
    if not each or not order.prefix_cache:
        return 0
    allowed = order.state_bytes
    if order.memory_bytes is not None and order.devices[0] == CPU:
        allowed = min(allowed, order.memory_bytes // STATES_SHARE, max(0, order.memory_bytes - needed))
    return allowed // (len(order.devices) * each)


def _order(plan: LoadPlan) -> Load:
    """The order for rank 0 of one."""
    order, detail = plan.order, plan.detail
    return Load(
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
        checkpoints=detail.checkpoints,
        windowed=detail.windowed,
        options=detail.options,
    )
