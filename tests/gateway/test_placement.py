"""Placement: the least busy replica, loading and failed ones last, and a reason where there is none."""

import pytest

from cortex.gateway.fleet import Fleet
from cortex.gateway.node import NodeClient
from cortex.gateway.placement import choose, why_not
from cortex.web.pool import Pool
from cortex.wire.errors import NoCapacity
from cortex.wire.node import ModelReport, Servable


def fleet_of(**states):
    """Nodes that have `m` in a state; `lost` is a node that reported it and went away."""
    fleet = Fleet(NodeClient(name, f"http://{name}", Pool()) for name in states)
    for name, state in states.items():
        lost = state == "lost"
        servable = Servable(ok=state == "loaded" or lost, reason=state)
        status = "loaded" if lost or state == "squeezed" else state
        fleet.saw_models(fleet.nodes[name], [ModelReport(id="m", status=status, servable=servable)])
        if lost:
            for _ in range(3):
                fleet.missed(fleet.nodes[name], "gone")
    return fleet


def chosen(fleet, tried=()):
    node = choose(fleet.replicas("m"), "m", tried)
    return node.name if node else None


def test_ties_go_by_name_and_load_decides_otherwise():
    fleet = fleet_of(b="loaded", a="loaded")
    assert chosen(fleet) == "a"
    with fleet.lease(fleet.nodes["a"], "m"):
        assert chosen(fleet) == "b"
        with fleet.lease(fleet.nodes["b"], "other"), fleet.lease(fleet.nodes["b"], "m"):
            assert chosen(fleet) == "a"
    assert chosen(fleet) == "a"


def test_a_node_that_was_tried_is_not_chosen_again():
    fleet = fleet_of(a="loaded", b="loaded")
    assert chosen(fleet, {"a"}) == "b"
    assert chosen(fleet, {"a", "b"}) is None


@pytest.mark.parametrize("state", ["draining", "unloaded", "squeezed", "lost"])
def test_only_what_can_serve_is_chosen(state):
    assert chosen(fleet_of(a=state)) is None
    assert chosen(fleet_of(a=state, b="loaded")) == "b"


def test_a_model_that_is_loading_or_failed_is_the_last_resort():
    """A node holds the requests for what it loads, so that a cold load is a wait and no refusal."""
    assert chosen(fleet_of(a="loading", b="loaded")) == "b"
    assert chosen(fleet_of(a="failed", b="loading", c="loaded")) == "c"
    assert chosen(fleet_of(a="failed", b="loading")) == "b"
    assert chosen(fleet_of(a="failed")) == "a"


@pytest.mark.parametrize(
    ("states", "told"),
    [
        ({"a": "lost"}, "on a, which does not answer"),
        ({"a": "draining", "b": "lost"}, "a: draining"),
        ({"a": "squeezed"}, "a: squeezed"),
    ],
)
def test_the_reason_names_the_nodes(states, told):
    error = why_not(fleet_of(**states).replicas("m"), "m")
    assert isinstance(error, NoCapacity)
    assert told in error.message
    assert error.retry_after == 5


def test_leases_leave_nothing_behind():
    fleet = fleet_of(a="loaded")
    node = fleet.nodes["a"]
    with pytest.raises(ValueError, match="x"), fleet.lease(node, "m"):
        assert node.in_flight == {"m": 1}
        raise ValueError("x")
    assert (node.in_flight, node.total_in_flight) == ({}, 0)
