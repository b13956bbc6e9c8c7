"""Which node serves a request, or why none does: purely from what is known. Asks nobody, changes nothing."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from cortex.gateway.fleet import Fleet, Node
from cortex.wire.errors import CortexError, NoCapacity, UnknownModel
from cortex.wire.node import ModelReport

RETRY_S = 5
UNREACHED_S = 300.0
"""A node that has not answered for so long since the gateway's start is not just starting as well."""


def choose(replicas: Sequence[Node], model_id: str, tried: Collection[str] = ()) -> Node | None:
    """The least busy node that serves the model and was not tried yet, or None.

    Least busy by requests of this model, then of the whole node, then by name. After the nodes that have
    it loaded comes one that is loading it, which holds requests until it has, and last one whose model
    failed: it loads the model again when it is asked.
    """
    best: tuple[tuple[int, int, int, str], Node] | None = None
    for node in replicas:
        if not node.up or node.name in tried:
            continue
        rank = _rank(node.models[model_id])
        if rank is None:
            continue
        order = (rank, node.in_flight.get(model_id, 0), node.total_in_flight, node.name)
        if best is None or order < best[0]:
            best = (order, node)
    return best[1] if best else None


def _rank(report: ModelReport) -> int | None:
    if report.status == "loaded":
        return 0 if report.servable.ok else None
    return {"loading": 1, "failed": 2}.get(report.status)


def why_unknown(
    fleet: Fleet, name: str, missing: UnknownModel | None = None, *, named: bool = False
) -> CortexError:
    """What is said of a model that no node has reported: `missing`, or that there is none of that `name`.

    As long as a node has never answered nobody knows that: it may be the one that has the model, and a
    client that is told to try again does. But a node may be away for days, and all the while a mistyped name
    would be tried again and reported as want of capacity. So a name that is not `named` by the operator is
    believed to be wrong after a while, if there is any node that could have known it.
    """
    unseen = [node.name for node in fleet.nodes.values() if not node.seen]
    away = ", ".join(unseen)
    if unseen and (named or len(unseen) == len(fleet.nodes) or fleet.age < UNREACHED_S):
        return NoCapacity(
            f"No node has reported the model {name!r}, and {away} has not answered yet. "
            f"Try again, or look at `cortex status`.",
            retry_after=RETRY_S,
        )
    asked = f" {away} could not be asked: no answer since this gateway runs." if unseen else ""
    return missing or UnknownModel(
        f"There is no model {name!r} here. GET /v1/models lists those that there are.{asked}", param="model"
    )


def why_not(replicas: Sequence[Node], model_id: str) -> CortexError:
    """Why none of the nodes that have the model can serve it now."""
    lost = [node.name for node in replicas if not node.up]
    if lost and len(lost) == len(replicas):
        return NoCapacity(
            f"The model {model_id!r} is on {', '.join(lost)}, which does not answer. "
            f"Try again, or look at `cortex status`.",
            retry_after=RETRY_S,
        )
    up = [node for node in replicas if node.up]
    states = ", ".join(f"{node.name}: {_state(node.models[model_id])}" for node in up)
    return NoCapacity(
        f"No node can serve the model {model_id!r} now ({states}). Load it with `cortex load`, or try again.",
        retry_after=RETRY_S,
    )


def _state(report: ModelReport) -> str:
    if report.status == "loaded" and not report.servable.ok:
        return report.servable.detail or report.servable.reason or "not servable"
    return report.status
