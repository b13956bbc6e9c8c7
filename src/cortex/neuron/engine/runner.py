"""Runs the model on step plans: plan to tensors to the logits of the wanted rows.

Owns model, cache and device; knows no sequences and no sampling.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from cortex.neuron.engine.cache import SlotCache
from cortex.neuron.models import registry
from cortex.neuron.models.registry import CausalModel
from cortex.neuron.models.shape import ModelShape, read_shape
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.plan import StepPlan
from cortex.neuron.nn.step import prepare
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.loader import Report, load


class Runner:
    def __init__(
        self, model: CausalModel, shape: ModelShape, cache: SlotCache, placement: Placement, weight_bytes: int
    ) -> None:
        self._model = model
        self._cache = cache
        self.device = placement.device
        self.shape = shape
        self.weight_bytes = weight_bytes
        self.cache_bytes = cache.nbytes

    @torch.inference_mode()
    def logits(self, plan: StepPlan) -> Tensor:
        """fp32 [wanted, vocab] on the device; the cache then holds the plan's tokens."""
        return self._model(prepare(plan, self.device), self._cache.layers)


def load_runner(
    path: Path, placement: Placement, *, slots: int, context: int, report: Report, threads: int = 1
) -> Runner:
    """Load the checkpoint at `path`. Raises LoadFailed; what `report` raises passes through."""
    with open_checkpoint(path) as checkpoint:
        shape = read_shape(checkpoint)
        family = registry.family(shape.architecture)
        model = family.build(shape, placement)
        load(model, family.sources(shape, checkpoint.kind), checkpoint, report, threads=threads)
    weight_bytes = sum(getattr(module, "nbytes", 0) for module in model.modules())
    cache = SlotCache(shape.layers, slots, shape.kv_heads, shape.head_dim, context, placement.device)
    return Runner(cast(CausalModel, model), shape, cache, placement, weight_bytes)
