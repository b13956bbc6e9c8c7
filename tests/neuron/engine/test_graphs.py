"""Decode graphs with numbers: what a graph is fed, and what its padding does; a replay computes again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.neuron.engine.graphs import DecodeGraphs
from cortex.neuron.engine.paged import PAGE
from cortex.neuron.engine.runner import CudaOptions, load_runner
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.plan import Segment, StepPlan
from cortex.neuron.nn.step import Step

LONG = [(2 * PAGE, PAGE), (0, 5)]
"""A sequence of 261 tokens in two pages that are not neighbours."""


def run_again(compute: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Stands in for a capture: a replay computes into the tensor of the first run."""
    result = compute()

    def replay() -> None:
        result.copy_(compute())

    return replay, result


def seen(step: Step) -> Tensor:
    """A model that gives each row back: id, position, slot, keys, first and last page of its table."""
    pages = step.pages
    assert pages is not None
    rows = (
        step.ids,
        step.positions,
        step.full.slots,
        pages.key_counts,
        pages.table[:, 0],
        pages.table[:, -1],
    )
    return torch.stack([row.to(torch.float32) for row in rows], dim=1)


def graphs_on_cpu() -> DecodeGraphs:
    return DecodeGraphs(
        seen, pages=3, page=PAGE, spare=4 * PAGE, device=torch.device("cpu"), capture=run_again
    )


def test_a_graph_computes_the_rows_of_the_plan_and_padding_that_harms_nobody() -> None:
    graphs = graphs_on_cpu()
    three = [Segment(260, 1, LONG), Segment(3, 1, [(PAGE, 4)]), Segment(0, 1, [(3 * PAGE, 1)])]
    logits = graphs.logits(StepPlan([7, 8, 9], three, [0, 1, 2]))
    assert logits is not None
    assert logits.tolist() == [
        [7, 260, 4, 261, 2, 4],
        [8, 3, PAGE + 3, 4, 1, 4],
        [9, 0, 3 * PAGE, 1, 3, 4],
    ]
    padding = graphs._captured[4].logits[3]
    assert padding.tolist() == [0, 0, 4 * PAGE, 1, 4, 4]


def test_a_bucket_is_captured_once_and_filled_anew_each_time() -> None:
    graphs = graphs_on_cpu()
    for count in (3, 4, 1, 3):
        segments = [Segment(row, 1, [(row * PAGE, row + 1)]) for row in range(count)]
        logits = graphs.logits(StepPlan([*range(count)], segments, [*range(count)]))
        assert logits is not None
        assert logits[:, 0].tolist() == [*range(count)]
        assert logits[:, 2].tolist() == [row * PAGE + row for row in range(count)]
    assert graphs.buckets == [1, 4]


def test_ids_that_are_on_the_device_are_those_of_a_step_that_follows() -> None:
    graphs = graphs_on_cpu()
    for ids in ([5], [6, 7, 8]):
        segments = [Segment(row, 1, [(row * PAGE, row + 1)]) for row in range(len(ids))]
        plan = StepPlan([0] * len(ids), segments, [*range(len(ids))], follows=[*range(len(ids))])
        logits = graphs.logits(plan, torch.tensor(ids))
        assert logits is not None
        assert logits[:, 0].tolist() == ids
    assert graphs._captured[4].logits[3, 0] == 0


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan([1] * 3, [Segment(0, 3, [(0, 3)])], [2]),
        StepPlan([1, 2], [Segment(0, 1, [(0, 1)]), Segment(0, 1, [(PAGE, 1)])], [1]),
        StepPlan([], [], []),
    ],
    ids=["prefill", "a row that nobody wants", "nothing"],
)
def test_steps_that_do_more_than_decode_are_not_for_a_graph(plan: StepPlan) -> None:
    assert graphs_on_cpu().logits(plan) is None


@pytest.mark.parametrize(
    ("kind", "has_graphs"), [("llama", True), ("qwen3_moe", False), ("qwen3_5_text", False)]
)
def test_models_that_decide_on_the_host_have_no_graphs(
    kind: str, has_graphs: bool, make_tiny: Callable[..., Any]
) -> None:
    """Which experts a step needs is read from the device, and a capture ends at that."""
    runner = load_runner(
        make_tiny(kind).directory,
        Placement(torch.device("cpu"), "float32"),
        cache_rows=2 * PAGE,
        report=lambda done, total: None,
        cuda=CudaOptions(paged=True, graphs=True),
    )
    assert (runner._graphs is not None) == has_graphs
