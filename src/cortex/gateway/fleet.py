"""The gateway's picture of its nodes: what each reported last, and what this gateway has in flight there.

The poller writes reports, the main path holds leases; nobody else changes anything. The picture is
advice: a node may have moved on since, and its own answer decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from cortex.gateway.node import NodeClient
from cortex.wire.node import Discovery, Health, ModelReport, Version

MISSES_UNTIL_LOST = 3


class Node:
    """One neuron. Starts as lost, until its first good poll."""

    def __init__(self, client: NodeClient) -> None:
        self.client = client
        self.name = client.name
        self.up = False
        self.seen = False
        """It has answered a poll since this gateway runs."""
        self.misses = 0
        self.detail: str | None = "not polled yet"
        self.discovery: Discovery | None = None
        self.version: Version | None = None
        self.health: Health | None = None
        self.models: Mapping[str, ModelReport] = {}
        self.in_flight: dict[str, int] = {}
        self._listed: frozenset[str] = frozenset()

    @property
    def total_in_flight(self) -> int:
        return sum(self.in_flight.values())

    def lists(self, request_id: str) -> bool:
        """True while the node's last health report counts the request as in flight."""
        return self.up and request_id in self._listed

    def saw_health(self, health: Health) -> None:
        self.health = health
        self._listed = frozenset(health.requests)


class Fleet:
    def __init__(
        self, clients: Iterable[NodeClient] = (), *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._started = clock()
        self.nodes: dict[str, Node] = {client.name: Node(client) for client in clients}
        self._replicas: dict[str, tuple[Node, ...]] = {}

    @property
    def age(self) -> float:
        """Seconds for which nodes could have answered."""
        return self._clock() - self._started

    def replicas(self, model_id: str) -> Sequence[Node]:
        """Nodes whose last report has the model in any status, lost nodes included."""
        return self._replicas.get(model_id, ())

    def knows(self, model_id: str) -> bool:
        return model_id in self._replicas

    @property
    def model_ids(self) -> Iterable[str]:
        return self._replicas.keys()

    def saw_models(self, node: Node, models: Sequence[ModelReport]) -> bool:
        """A good poll. Returns True if the node was lost until now."""
        returned = not node.up
        node.up, node.seen, node.misses, node.detail = True, True, 0, None
        node.models = {report.id: report for report in models}
        self._index()
        return returned

    def missed(self, node: Node, detail: str) -> bool:
        """A failed poll. Returns True if this one makes the node count as lost."""
        node.misses += 1
        if node.misses < MISSES_UNTIL_LOST and node.up:
            return False
        lost = node.up
        node.up, node.detail = False, detail
        return lost

    @contextmanager
    def lease(self, node: Node, model_id: str) -> Iterator[None]:
        """Counts a request as in flight on the node, from the decision on, whatever becomes of it."""
        node.in_flight[model_id] = node.in_flight.get(model_id, 0) + 1
        try:
            yield
        finally:
            left = node.in_flight[model_id] - 1
            if left:
                node.in_flight[model_id] = left
            else:
                del node.in_flight[model_id]

    def _index(self) -> None:
        """Done once a poll, so that a request finds its replicas without looking at the fleet."""
        replicas: dict[str, list[Node]] = {}
        for node in self.nodes.values():
            for model_id in node.models:
                replicas.setdefault(model_id, []).append(node)
        self._replicas = {model_id: tuple(nodes) for model_id, nodes in replicas.items()}
