"""Runs the model on step plans: plan to tensors to the logits of the wanted rows.

Owns model, cache and device of one rank; knows no sequences and no sampling.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from torch import Tensor

from cortex.neuron.engine.cache import RunCache
from cortex.neuron.engine.graphs import DecodeGraphs
from cortex.neuron.engine.paged import PAGE, PagedCache
from cortex.neuron.engine.states import StatePool
from cortex.neuron.engine.windows import WindowPool
from cortex.neuron.models import registry
from cortex.neuron.models.decoder import Pass
from cortex.neuron.models.division import indivisible
from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.registry import CausalModel
from cortex.neuron.models.shape import Kind, ModelShape
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.plan import NearSlots, StepPlan
from cortex.neuron.nn.staging import STAGING
from cortex.neuron.nn.step import Step, prepare
from cortex.neuron.nn.transfer import to_device
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.loader import Report, load
from cortex.wire.errors import LoadFailed


class CudaOptions(NamedTuple):
    """What is opt-in on CUDA until it has been verified on hardware."""

    paged: bool = False
    graphs: bool = False


PLAIN: Final = CudaOptions()


class Runner:
    """`graphs`, where there are any, compute the steps that only decode."""

    def __init__(
        self,
        model: CausalModel,
        shape: ModelShape,
        cache: RunCache | PagedCache,
        placement: Placement,
        weight_bytes: int,
        graphs: DecodeGraphs | None = None,
        states: StatePool | None = None,
        windows: WindowPool | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._page = PAGE if isinstance(cache, PagedCache) else None
        self._graphs = graphs
        self.device = placement.device
        self.shape = shape
        self.weight_bytes = weight_bytes
        self.most_threads: int | None = None
        """More CPU threads than this do not make a step faster, if that is known."""
        self._pools = tuple(pool for pool in (states, windows) if pool is not None)
        self._has_states = shape.delta is not None
        self._near = None if windows is None else windows.sizes
        self._row_bytes = shape.layer_kv_bytes // shape.kv_heads * placement.share.divide(shape.kv_heads)
        self._way: Pass | None = None
        """The chunk that goes through the model a few layers a step."""
        self.cache_bytes = cache.nbytes + sum(pool.nbytes for pool in self._pools)
        keys = iter(cache.layers)
        of_kind: dict[Kind, Iterator[Any]] = {"full": keys, "sliding": keys}
        if states is not None:
            of_kind["delta"] = iter(states.layers)
        if windows is not None:
            of_kind["sliding"] = iter(windows.layers)
        self._layers = [next(of_kind[shape.kind(index)]) for index in range(shape.layers)]

    @torch.inference_mode()
    def logits(self, plan: StepPlan, sampled: Tensor | None = None) -> Tensor:
        """fp32 [wanted, vocab] on the device, of a chunk once it is through; the cache has its tokens.

        `sampled`, int64 on the device, is what the step before it has sampled, if it follows that.
        """
        if plan.copies:
            self._cache.copy(plan.copies)
        for pool in self._pools:
            pool.copy(plan.states)
            pool.begin(plan.chunk.segments if plan.chunk else plan.segments)
        if plan.layers:
            found = self._pass_layers(plan)
        else:
            ids = None
            if plan.follows:
                assert sampled is not None, "it follows a step that has sampled"
                ids = sampled.index_select(0, to_device(plan.follows, self.device))
            captured = None if self._graphs is None else self._graphs.logits(plan, ids)
            found = self._model(self._prepare(plan, ids), self._layers) if captured is None else captured
        if not found.shape[0] and self.device.type == "cuda" and torch.cuda.is_available():
            # Nobody reads anything of the step, and the loop wants to know how long it takes.
            torch.cuda.synchronize(self.device)
        return found

    def _pass_layers(self, plan: StepPlan) -> Tensor:
        """The chunk that is on its way, or a new one, through so many layers."""
        if plan.chunk is not None:
            self._way = self._model.begin(self._prepare(plan.chunk))
        way = self._way
        if way is None:
            raise ValueError(f"no chunk is on its way, and is to pass {plan.layers} layers")
        self._model.advance(way, self._layers, plan.layers)
        if way.passed < self.shape.layers:
            return way.hidden.new_empty(0, self.shape.vocab)
        self._way = None
        return self._model.end(way)

    def _prepare(self, plan: StepPlan, ids: Tensor | None = None) -> Step:
        sizes = (self._page, self.shape.window, self._near)
        return prepare(plan, self.device, *sizes, row_bytes=self._row_bytes, states=self._has_states, ids=ids)


def load_runner(
    path: Path,
    placement: Placement,
    *,
    cache_rows: int,
    report: Report,
    threads: int = 1,
    cuda: CudaOptions = PLAIN,
    working: int = 1,
    kept: int = 0,
    stride: int | None = None,
) -> Runner:
    """Load a rank's share of the checkpoint at `path`, with a cache of so many tokens and, where the model
    has layers with states, slots for `working` sequences and `kept` checkpoints. With `stride`, layers with
    a window keep that and at most so many tokens more, also in such slots.

    Raises LoadFailed; what `report` raises passes through.
    """
    model, shape = _load_model(path, placement, report, threads)
    weight_bytes = sum(getattr(module, "nbytes", 0) for module in model.modules())
    causal = cast(CausalModel, model)
    device, share = placement.device, placement.share
    layers = shape.attention_layers
    sizes = (share.divide(shape.kv_heads), shape.head_dim, device)
    states = None
    if shape.delta is not None:
        states = StatePool(shape.delta, len(shape.delta_layers), working, kept, device, share)
    if stride is not None and (cuda.paged or cuda.graphs):
        raise ValueError("a cache in pages keeps all rows of every layer; it has no slots for windows")
    windows = None
    if stride is not None and shape.window is not None:
        slots = NearSlots(shape.window, stride)
        windows = WindowPool(slots, len(shape.sliding_layers), working, kept, *sizes)
        layers = tuple(index for index in layers if index not in shape.sliding_layers)
    near = [at for at, index in enumerate(layers) if index in shape.sliding_layers]
    if not (cuda.paged or cuda.graphs):
        runs = RunCache(len(layers), cache_rows, *sizes, near=near)
        return Runner(causal, shape, runs, placement, weight_bytes, states=states, windows=windows)
    # The last page is for padding.
    cache = PagedCache(len(layers), cache_rows + PAGE, *sizes, near=near, window=shape.window)
    # A graph would have to find the slots of states, and which experts are chosen, anew.
    if not cuda.graphs or states is not None or shape.experts is not None:
        return Runner(causal, shape, cache, placement, weight_bytes, states=states)
    graphs = DecodeGraphs(
        lambda step: causal(step, cache.layers),
        pages=-(-min(shape.max_position, cache_rows) // PAGE),
        page=PAGE,
        spare=cache_rows,
        device=device,
    )
    return Runner(causal, shape, cache, placement, weight_bytes, graphs)


def _load_model(
    path: Path, placement: Placement, report: Report, threads: int
) -> tuple[torch.nn.Module, ModelShape]:
    with open_checkpoint(path) as checkpoint:
        shape = read_shape(checkpoint)
        hindrance = indivisible(shape, placement.share.world)
        if hindrance is not None:
            raise LoadFailed(hindrance)
        family = registry.family(shape.architecture)
        model = family.build(shape, placement)
        sources = family.sources(shape, checkpoint.kind, placement.share)
        try:
            load(model, sources, checkpoint, report, threads=threads)
        finally:
            STAGING.release()
    return model, shape
