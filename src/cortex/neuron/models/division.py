"""How a model is divided among ranks: what a rank has of it, and why some models cannot be.

Plain numbers, for whoever plans a load and for whoever carries it out. Knows no torch and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from cortex.neuron.models.shape import ModelShape


def indivisible(shape: ModelShape, ranks: int) -> str | None:
    """Why `ranks` ranks cannot hold the model together, as a sentence with the numbers; None if they can.

    Fewer KV heads than ranks are no hindrance: each is then held by as many ranks as it takes.
    """
    if shape.kv_heads % ranks and (shape.kv_heads > ranks or ranks % shape.kv_heads):
        return f"{shape.kv_heads} KV heads can neither be divided among {ranks} ranks nor repeated evenly."
    for name, size in _divided(shape):
        if size % ranks:
            return f"{size} {name} cannot be divided among {ranks} ranks."
    if shape.vocab < ranks:
        return f"A vocabulary of {shape.vocab} cannot be divided among {ranks} ranks."
    return None


def largest_share(shape: ModelShape, ranks: int) -> ModelShape:
    """What the rank that has most of the model has of it, as a shape of its own."""
    delta, experts = shape.delta, shape.experts
    if delta is not None:
        delta = msgspec.structs.replace(
            delta, key_heads=delta.key_heads // ranks, value_heads=delta.value_heads // ranks
        )
    if experts is not None:
        experts = msgspec.structs.replace(
            experts, count=experts.count // ranks, shared_intermediate=experts.shared_intermediate // ranks
        )
    return msgspec.structs.replace(
        shape,
        heads=shape.heads // ranks,
        kv_heads=max(1, shape.kv_heads // ranks),
        intermediate=shape.intermediate // ranks,
        vocab=-(-shape.vocab // ranks),
        delta=delta,
        experts=experts,
    )


def rank_weight_bytes(shape: ModelShape, ranks: int, dtype: str, *, packs: bool = True) -> int:
    """Most bytes of one rank's loaded weights; `dtype` and `packs` as in `ModelShape.weight_bytes`."""
    share = largest_share(shape, ranks)
    size = share.weight_bytes(dtype, packs=packs)
    if ranks == 1 or shape.experts is None or share.experts is None:
        return size
    # Every rank has the whole router, in fp64; the share has counted its own part in fp32.
    more = 2 * shape.experts.count - share.experts.count
    return size + 4 * shape.hidden * more * sum(map(shape.has_experts, range(shape.layers)))


def _divided(shape: ModelShape) -> Iterator[tuple[str, int]]:
    """What there must be equally much of on every rank."""
    yield "heads", shape.heads
    if not all(map(shape.has_experts, range(shape.layers))):
        yield "intermediate rows", shape.intermediate
    if shape.experts is not None:
        yield "experts", shape.experts.count
        yield "intermediate rows of the shared expert", shape.experts.shared_intermediate
    if shape.delta is not None:
        yield "key heads of the DeltaNet", shape.delta.key_heads
        yield "value heads of the DeltaNet", shape.delta.value_heads
