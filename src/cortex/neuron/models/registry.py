"""Which architectures there are, and the module of the family that builds each.

Importing this imports no torch; families are imported by name when a worker needs them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

if TYPE_CHECKING:
    from torch import Tensor, nn

    from cortex.neuron.models.decoder import Pass
    from cortex.neuron.models.shape import ModelShape
    from cortex.neuron.nn.placement import Placement, Share
    from cortex.neuron.nn.step import Step
    from cortex.neuron.weights.source import Source

_MODULES: Final = "cortex.neuron.models."

FAMILIES: Final[Mapping[str, str]] = {
    "llama": f"{_MODULES}llama",
    "mistral": f"{_MODULES}mistral",
    "qwen2": f"{_MODULES}qwen2",
    "qwen3": f"{_MODULES}qwen3",
    "qwen3_moe": f"{_MODULES}qwen3_moe",
    "qwen3moe": f"{_MODULES}qwen3_moe",
    "qwen3_next": f"{_MODULES}qwen3_next",
    "qwen3next": f"{_MODULES}qwen3_next",
    "qwen3_5": f"{_MODULES}qwen3_5",
    "qwen3_5_text": f"{_MODULES}qwen3_5",
    "qwen35": f"{_MODULES}qwen3_5",
    "qwen3_5_moe": f"{_MODULES}qwen3_5_moe",
    "qwen3_5_moe_text": f"{_MODULES}qwen3_5_moe",
    "qwen35moe": f"{_MODULES}qwen3_5_moe",
    "gemma3": f"{_MODULES}gemma3",
    "gemma3_text": f"{_MODULES}gemma3",
}
"""Architecture, as GGUF and Hugging Face name it, to the module of the family that builds it."""
HYBRID: Final = ("qwen3_next", "qwen3_5", "qwen3_5_moe")
"""Families that mix layers of attention with layers of Gated DeltaNet."""
WITH_EXPERTS: Final = ("qwen3_moe", "qwen3_next", "qwen3_5_moe")
"""Families whose models may have experts."""


class Family(Protocol):
    """What a family's module offers."""

    def build(self, shape: ModelShape, placement: Placement) -> nn.Module:
        """The model on the meta device; it is called as a `CausalModel`."""

    def sources(self, shape: ModelShape, kind: str, share: Share) -> dict[str, Source]:
        """The source of every parameter of a rank in a checkpoint of `kind`, by the parameter's name."""


class CausalModel(Protocol):
    """A model once it is filled."""

    def __call__(self, step: Step, caches: Sequence[Any]) -> Tensor:
        """Logits of the wanted rows: fp32 [wanted, vocabulary]. `caches` has for each layer the cache of its
        keys and values, a `LayerCache`, or the state that it has instead, a `LayerState`."""

    def begin(self, step: Step) -> Pass:
        """The same some layers at a time: before the first one."""

    def advance(self, way: Pass, caches: Sequence[Any], layers: int) -> None:
        """Through the next so many layers, of those that are left."""

    def end(self, way: Pass) -> Tensor:
        """After the last one: the logits."""


def family(architecture: str) -> Family:
    """Raises KeyError for an architecture outside FAMILIES."""
    return cast(Family, importlib.import_module(FAMILIES[architecture]))


def family_name(architecture: str) -> str:
    """The last part of the module's name."""
    return FAMILIES[architecture].rpartition(".")[2]


def import_families() -> None:
    """Import every family, so that processes forked later find them in memory."""
    for module in set(FAMILIES.values()):
        importlib.import_module(module)
