"""What the gateway says of its fleet: the merged model listing, the health, the nodes.

Reads the fleet and the catalogue; asks no node.
"""

from __future__ import annotations

from typing import Any

from cortex.gateway.catalogue import Catalogue, Entry
from cortex.gateway.fleet import Fleet, Node
from cortex.gateway.placement import why_unknown
from cortex.wire.node import Limit, ModelCard, ModelReport, NodeView


class Listing:
    def __init__(self, fleet: Fleet, catalogue: Catalogue) -> None:
        self._fleet = fleet
        self._catalogue = catalogue

    def cards(self) -> list[ModelCard]:
        """Every model of the catalogue and of any node, then the aliases of those; sorted by id."""
        ids = sorted({*self._catalogue.entries, *self._fleet.model_ids})
        cards = {model_id: self._card_of(model_id) for model_id in ids}
        for alias, target in sorted(self._catalogue.aliases.items()):
            if target in cards and alias not in cards:
                cards[alias] = self._card_of(target, alias)
        return list(cards.values())

    def card(self, name: str) -> ModelCard:
        """One model or alias. Raises UnknownModel, or NoCapacity while a node may have it."""
        target = self._catalogue.resolve(name)
        if not self._fleet.knows(target) and target not in self._catalogue.entries:
            raise why_unknown(self._fleet, name, named=target != name)
        return self._card_of(target, name if name != target else None)

    def _card_of(self, model_id: str, alias: str | None = None) -> ModelCard:
        entry = self._catalogue.entries.get(model_id) or Entry(id=model_id)
        reports = [(node, node.models[model_id]) for node in self._fleet.replicas(model_id)]
        live = [report for node, report in reports if node.up]
        return ModelCard(
            id=alias or model_id,
            alias_of=model_id if alias else None,
            loaded=any(report.status == "loaded" for report in live),
            locations=[
                {"node": node.name, "status": report.status if node.up else "unreachable"}
                for node, report in reports
            ],
            limit=_smallest_limit(live) or entry.limit,
            capabilities=sorted({item for report in live for item in report.capabilities})
            or list(entry.capabilities),
            tool_call=any(report.tool_call for report in live),
            reasoning=any(report.reasoning for report in live),
            cost=dict(entry.cost) if entry.cost is not None else None,
        )

    def health(self) -> dict[str, Any]:
        """`degraded` without any healthy node, `impaired` if a healthy node has a model it cannot serve."""
        nodes = list(self._fleet.nodes.values())
        unservable = [
            {"node": node.name, "model": report.id, "reason": report.servable.reason or report.status}
            | ({"detail": report.servable.detail} if report.servable.detail else {})
            for node in nodes
            if node.up
            for report in node.models.values()
            if report.status in ("loaded", "failed") and not report.servable.ok
        ]
        healthy = sum(node.up for node in nodes)
        status = "degraded" if not healthy else "impaired" if unservable else "ok"
        body: dict[str, Any] = {"status": status, "nodes": {"healthy": healthy, "total": len(nodes)}}
        return body | ({"unservable": unservable} if unservable else {})

    def nodes(self) -> list[NodeView]:
        return [_view(node) for node in self._fleet.nodes.values()]


def _smallest_limit(reports: list[ModelReport]) -> Limit | None:
    """What every replica can do: a client must not be promised more than the smallest."""
    limits = [report.limit for report in reports if report.limit and report.limit.context]
    return min(limits, key=lambda limit: limit.context) if limits else None


def _view(node: Node) -> NodeView:
    return NodeView(
        name=node.name,
        endpoint=node.client.endpoint,
        up=node.up,
        detail=node.detail,
        version=node.version.package_version if node.version else None,
        devices=node.discovery.devices if node.discovery else [],
        device_health=node.health.devices if node.health else [],
        models=list(node.models.values()),
    )
