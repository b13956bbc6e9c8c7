"""What a rank other than 0 does with plans, and what it says when it cannot go on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.neuron.engine.channel import Channel
from cortex.neuron.engine.loading import load_model
from cortex.neuron.engine.messages import Broken, Load, Threads, Unframer, decode_report, frame
from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.worker import follow
from cortex.neuron.nn.parallel import RankGone, RankSilent
from cortex.neuron.nn.placement import Share
from cortex.neuron.nn.plan import Segment, StepPlan
from cortex.wire.errors import LoadFailed

PLAN = StepPlan([5], [Segment(0, 1, [(0, 1)])], [0])


class Runner:
    """Executes as it is told to."""

    most_threads = None

    def __init__(self) -> None:
        self.plans: list[StepPlan] = []
        self.fails: Exception | None = None

    def logits(self, plan: StepPlan) -> Tensor:
        self.plans.append(plan)
        if self.fails is not None:
            raise self.fails
        return torch.zeros(1)


class Bench:
    """Rank 1 between the node's socket and rank 0's link."""

    def __init__(self, sockets: list[socket.socket]) -> None:
        self.node, theirs, self._link, link = sockets
        self.runner = Runner()
        self.channel = Channel(theirs)
        self._ranks = Ranks(Share(1, 2), [link])
        self._first = Ranks(Share(0, 2), [self._link])

    def follow(self, plans: int) -> None:
        """So many plans from rank 0, which ends then."""
        for _ in range(plans):
            self._first.tell(PLAN)
        self._link.close()
        follow(self.channel, self.runner, self._ranks)  # type: ignore[arg-type]

    def said(self) -> list[object]:
        self.node.setblocking(False)
        try:
            return [decode_report(body) for body in Unframer().feed(self.node.recv(65536))]
        except BlockingIOError:
            return []


@pytest.fixture
def bench() -> Iterator[Bench]:
    sockets = [*socket.socketpair(), *socket.socketpair()]
    yield Bench(sockets)
    for sock in sockets:
        sock.close()


def test_plans_are_executed_until_rank_0_ends(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    bench.node.sendall(frame(Threads(threads=3)))
    bench.follow(2)
    assert bench.runner.plans == [PLAN, PLAN]
    assert told == [3]
    assert bench.said() == []


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "ran out of memory in a step"),
        (RuntimeError("odd"), "failed (RuntimeError: odd)"),
    ],
)
def test_a_step_that_fails_is_told_as_one(bench: Bench, error: Exception, reason: str) -> None:
    bench.runner.fails = error
    bench.follow(2)
    assert bench.runner.plans == [PLAN]
    assert bench.said() == [Broken(reason=reason, cause="step")]


def test_of_a_rank_that_has_ended_the_node_knows_itself(bench: Bench) -> None:
    bench.runner.fails = RankGone("closed")
    with pytest.raises(RankGone):
        bench.follow(1)
    assert bench.said() == []


def test_ranks_that_do_not_meet_are_why_the_load_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file, about which the rest of what can go wrong there is, is not to blame."""
    for setting in ("set_num_threads", "set_flush_denormal"):
        monkeypatch.setattr(torch, setting, lambda value: None)

    def meet(device: torch.device) -> None:
        raise RankSilent("waited 60 s for the other ranks to start, in vain")

    sizes: dict[str, Any] = {"context": 8, "cache_tokens": 8, "prefill_chunk": 8, "threads": 1}
    order = Load(path="m", dtype="float32", device="cpu", rank=1, world=2, **sizes)
    with pytest.raises(LoadFailed, match="have not met: this one waited 60 s for the other ranks to start"):
        load_model(order, bench.channel, SimpleNamespace(meet=meet))  # type: ignore[arg-type]
