"""How a model is divided among ranks: what a rank has of it, and why some models cannot be.

Plain numbers, for whoever plans a load and for whoever carries it out. Knows no torch and no tensors.
"""

from __future__ import annotations

import msgspec

from cortex.neuron.models.shape import ModelShape


def indivisible(shape: ModelShape, ranks: int) -> str | None:
    """Why `ranks` ranks cannot hold the model together, as a sentence with the numbers; None if they can.

    Fewer KV heads than ranks are no hindrance: each is then held by as many ranks as it takes.
    """
    if shape.kv_heads % ranks and (shape.kv_heads > ranks or ranks % shape.kv_heads):
        return f"{shape.kv_heads} KV heads can neither be divided among {ranks} ranks nor repeated evenly."
    sizes = {"heads": shape.heads, "intermediate rows": shape.intermediate}
    for name, size in sizes.items():
        if size % ranks:
            return f"{size} {name} cannot be divided among {ranks} ranks."
    if shape.vocab < ranks:
        return f"A vocabulary of {shape.vocab} cannot be divided among {ranks} ranks."
    return None


def largest_share(shape: ModelShape, ranks: int) -> ModelShape:
    """What the rank that has most of the model has of it, as a shape of its own."""
    return msgspec.structs.replace(
        shape,
        heads=shape.heads // ranks,
        kv_heads=max(1, shape.kv_heads // ranks),
        intermediate=shape.intermediate // ranks,
        vocab=-(-shape.vocab // ranks),
    )
