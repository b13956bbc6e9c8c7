"""A worker's first order: the model loaded as it says, and what the loop needs besides.

Knows the message and the runner; not what comes after.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast, get_args

import torch

from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.channel import Channel, PeerGone
from cortex.neuron.engine.checkpoints import StateBooks
from cortex.neuron.engine.messages import Load, LoadProgress, has_pages
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.paged import PAGE
from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.runner import CudaOptions, Runner, load_runner
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.threads import PROMPT, best_threads
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.nn.parallel import RankGone, RankSilent
from cortex.neuron.nn.placement import Dtype, Placement, Share
from cortex.wire.errors import LoadFailed

PROGRESS_INTERVAL: Final = 0.1
"""Seconds between two reports of a load."""
BLOCK: Final = 16
"""Tokens of a cache block: few, so that little of a turn is computed again."""
DRAFTING: Final = 4
"""Of so many sequences or fewer that decode together a CPU makes drafts: of eight, each row costs as much as
the tokens that it might save."""
INT4_CAPABILITY: Final = (8, 0)

_log: Final = logging.getLogger("cortex.neuron.worker")


def load_model(order: Load, channel: Channel, ranks: Ranks) -> Runner:
    """The model, or the rank's share of it, its threads chosen. Raises LoadFailed, PeerGone, RankGone."""
    if order.context < 1 or order.cache_tokens < order.context or order.prefill_chunk < 1:
        raise LoadFailed(
            f"A cache of {order.cache_tokens} tokens and chunks of {order.prefill_chunk} "
            f"cannot serve a context of {order.context}."
        )
    placement = _placement(order)
    try:
        # Numbers next to nothing, which decaying states come to, take a CPU a hundred times as long; threads
        # that start from here on have the setting too.
        torch.set_flush_denormal(True)
        # Loading keeps its threads busy with whole parameters; a step splits its operations.
        torch.set_num_threads(1)
        ranks.meet(placement.device)
        runner = load_runner(
            Path(order.path),
            placement,
            cache_rows=pool_blocks(order) * block_size(order),
            report=_reporter(channel),
            threads=order.threads,
            cuda=_cuda_options(order),
            working=order.max_running,
            kept=order.checkpoints,
            stride=_stride(order),
        )
        torch.set_num_threads(order.threads)
        if order.world == 1 and placement.device.type == "cpu":
            best = best_threads(runner, order.threads, min(PROMPT, order.context))
            runner.most_threads = best if best < order.threads else None
            torch.set_num_threads(best)
    except RankSilent as silent:
        raise LoadFailed(f"The ranks of the model have not met: this one {silent}.") from None
    except (LoadFailed, PeerGone, RankGone):
        raise
    except Exception as error:
        if out_of_memory(error):
            raise LoadFailed(f"{order.path} does not fit into the memory of {order.device}.") from None
        _log.exception("loading %s failed", order.path)
        raise LoadFailed(f"{order.path} could not be loaded ({type(error).__name__}: {error}).") from None
    return runner


def make_scheduler(order: Load, shape: ModelShape) -> Scheduler:
    states = None
    if shape.delta is not None or order.windowed:
        sizes = (order.max_running, order.checkpoints)
        states = StateBooks(*sizes, block=block_size(order), stride=_stride(order))
    return Scheduler(
        BlockPool(pool_blocks(order), block_size(order), caching=order.prefix_cache),
        context=order.context,
        pace=Pace(order.prefill_chunk, shape.layers, shape.even_context),
        vocab=shape.vocab,
        clock=time.monotonic,
        max_running=order.max_running,
        max_wait_s=order.max_wait_s,
        states=states,
        drafting=_drafting(order, shape),
    )


def _drafting(order: Load, shape: ModelShape) -> int:
    """Of how many sequences, at most, that decode together there are drafts. Steps of several that set out
    before the last one is read have none.
    """
    if order.options.get("prompt_lookup") is False or shape.delta is not None:
        return 0
    if runs_ahead(order, shape):
        return 1
    return DRAFTING if order.device == "cpu" else order.max_running


def _stride(order: Load) -> int | None:
    """Tokens that layers with a window keep beside it, if they keep no more."""
    return order.prefill_chunk if order.windowed else None


def pool_blocks(order: Load) -> int:
    return -(-order.cache_tokens // block_size(order))


def block_size(order: Load) -> int:
    return PAGE if has_pages(order.device, order.options) else BLOCK


def _cuda_options(order: Load) -> CudaOptions:
    options = order.options if order.device != "cpu" else {}
    return CudaOptions(options.get("cuda_paged") is True, options.get("cuda_graphs") is True)


def runs_ahead(order: Load, shape: ModelShape) -> bool:
    """Whether steps set out before the last one is read. The other ranks of a model could not, states cannot
    forget a token, and which experts a step needs is read on its way.
    """
    told = order.device != "cpu" and order.options.get("cuda_run_ahead") is True
    has_states = shape.delta is not None or order.windowed
    return told and order.world == 1 and shape.experts is None and not has_states


def out_of_memory(error: Exception) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _placement(order: Load) -> Placement:
    if order.dtype not in get_args(Dtype):
        raise LoadFailed(f"The dtype {order.dtype!r} is unknown; known are {', '.join(get_args(Dtype))}.")
    device = torch.device("cpu" if order.device == "cpu" else "cuda")
    placement = Placement(device, cast(Dtype, order.dtype), Share(order.rank, order.world))
    if order.dtype == "int4":
        _check_int4(device)
    if placement.packed and "fbgemm" not in torch.backends.quantized.supported_engines:
        raise LoadFailed(f"{order.dtype} needs FBGEMM, which this build of torch lacks; use dtype float32.")
    return placement


def _check_int4(device: torch.device) -> None:
    """torch multiplies by 4 bits on the tensor cores of Ampere and later."""
    if device.type == "cpu":
        raise LoadFailed("The form int4 exists on CUDA devices only; use int8, or leave quant out.")
    capability = torch.cuda.get_device_capability(device)
    if capability < INT4_CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (capability, INT4_CAPABILITY))
        raise LoadFailed(
            f"The form int4 needs a device of compute capability {needs}; this one has {has}. Use int8."
        )


def _reporter(channel: Channel) -> Callable[[int, int], None]:
    """Sends a load's progress now and then; each call notices a closed socket."""
    due = 0.0

    def report(done: int, total: int) -> None:
        nonlocal due
        channel.check()
        now = time.monotonic()
        if now >= due or done == total:
            due = now + PROGRESS_INTERVAL
            channel.send(LoadProgress(phase="weights", done=done, total=total))

    return report
