"""The sockets on which step plans go from rank 0 to the other ranks."""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from cortex.neuron.engine import ranks as engine_ranks
from cortex.neuron.engine.messages import framed
from cortex.neuron.engine.ranks import GRACE_S, Ranks
from cortex.neuron.nn.parallel import RankGone, RankSilent, be_patient, others_watched, sum_over_ranks
from cortex.neuron.nn.placement import Share
from cortex.neuron.nn.plan import Segment, StepPlan

PLAN = StepPlan([5], [Segment(0, 1, [(0, 1)])], [0])
WATCHDOG_S = 0.01

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """A link's ends: rank 0's and rank 1's."""
    ends = socket.socketpair()
    yield ends
    for end in ends:
        end.close()


@pytest.fixture
def first(pair: Pair) -> Ranks:
    return Ranks(Share(0, 2), [pair[0]], watchdog_s=WATCHDOG_S)


@pytest.fixture
def second(pair: Pair) -> Ranks:
    return Ranks(Share(1, 2), [pair[1]], watchdog_s=WATCHDOG_S)


def test_alone_plans_go_nowhere() -> None:
    alone = Ranks(Share())
    assert not alone.others
    alone.meet(torch.device("cpu"))
    alone.tell(PLAN)
    alone.rest()


@pytest.mark.parametrize(
    ("share", "count"), [(Share(), 1), (Share(0, 3), 1), (Share(1, 3), 2), (Share(1, 2), 0)]
)
def test_links_that_do_not_fit_the_share_are_refused(pair: Pair, share: Share, count: int) -> None:
    with pytest.raises(ValueError, match=f"rank {share.rank} of {share.world} has {count} links"):
        Ranks(share, pair[:count])


def test_plans_arrive_until_rank_0_ends(first: Ranks, second: Ranks, pair: Pair) -> None:
    first.tell(PLAN)
    first.tell(PLAN)
    pair[0].close()
    assert list(second.plans()) == [PLAN, PLAN]


def test_the_next_plan_is_waited_for_with_patience_only_while_rank_0_rests(
    first: Ranks, second: Ranks, pair: Pair
) -> None:
    plans = second.plans()
    first.rest()  # it does so anyway
    first.tell(PLAN)
    assert next(plans) == PLAN
    with pytest.raises(RankSilent, match="waited for rank 0 in vain"):
        next(plans)
    plans = second.plans()
    first.tell(PLAN)
    first.rest()
    first.rest()
    assert next(plans) == PLAN
    pair[0].close()
    assert list(plans) == []
    assert pair[1].gettimeout() is None, "it would wait for ever"


def test_a_rank_that_has_ended_is_noticed(first: Ranks, pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(RankGone, match="link fails") as gone:
        first.tell(PLAN)
    assert not isinstance(gone.value, RankSilent)


def test_a_rank_that_takes_no_plans_is_given_up(first: Ranks, second: Ranks, pair: Pair) -> None:
    pair[0].settimeout(WATCHDOG_S)
    with pytest.raises(RankSilent):
        for _ in range(10):
            first.tell(StepPlan([1] * 100_000, [], []))


class StoppedLink:
    """A link whose process was stopped: when it goes on, the time of its first wait is over."""

    def __init__(self) -> None:
        self.waits: list[float | None] = []
        self.sent = b""
        self._allowed: float | None = WATCHDOG_S

    def settimeout(self, seconds: float | None) -> None:
        self._allowed = seconds

    def gettimeout(self) -> float | None:
        return self._allowed

    def recv(self, size: int) -> bytes:
        self._wait()
        return b"" if len(self.waits) > 2 else framed(msgspec.msgpack.encode(PLAN))

    def send(self, data: memoryview) -> int:
        self._wait()
        self.sent += data[:3]
        return min(3, len(data))

    def _wait(self) -> None:
        self.waits.append(self._allowed)
        if len(self.waits) == 1:
            raise TimeoutError


def test_ranks_that_were_stopped_together_have_a_moment_to_go_on() -> None:
    link: Any = StoppedLink()
    assert list(Ranks(Share(1, 2), [link], watchdog_s=60).plans()) == [PLAN]
    assert link.waits == [WATCHDOG_S, GRACE_S, 60]
    link = StoppedLink()
    Ranks(Share(0, 2), [link], watchdog_s=WATCHDOG_S).tell(PLAN)
    assert link.sent == framed(msgspec.msgpack.encode(PLAN)), "no byte is lost or sent twice"
    assert set(link.waits) == {WATCHDOG_S}, "which a grace never exceeds"


class StoppedWork:
    def __init__(self, *errors: str) -> None:
        self.errors = list(errors)
        self.waits: list[float] = []

    def wait(self, *limits: datetime.timedelta) -> None:
        self.waits += [limit.total_seconds() for limit in limits]
        if self.errors:
            raise RuntimeError(self.errors.pop(0))


@pytest.fixture
def patience() -> Iterator[None]:
    be_patient(60, 5)
    yield
    be_patient()


@pytest.mark.parametrize(
    ("errors", "waits", "raised"),
    [
        ([], [60], None),
        (["Operation timed out!"], [60, 5], None),
        (["Operation timed out!"] * 2, [60, 5], RankSilent),
        (["Connection closed by peer"], [60], RankGone),
        (["Operation timed out!", "Connection closed by peer"], [60, 5], RankGone),
    ],
)
@pytest.mark.usefixtures("patience")
def test_a_collective_is_waited_for_once_more(
    monkeypatch: pytest.MonkeyPatch, errors: list[str], waits: list[float], raised: type[Exception] | None
) -> None:
    work = StoppedWork(*errors)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, async_op: work)
    with pytest.raises(raised) if raised else contextlib.nullcontext():
        sum_over_ranks(torch.zeros(1), Share(0, 2))
    assert work.waits == waits


def test_rank_0_that_ends_before_the_meeting_is_noticed(second: Ranks, pair: Pair) -> None:
    pair[0].close()
    with pytest.raises(RankGone, match="rank 0 has ended"):
        second.meet(torch.device("cpu"))


def test_a_rank_that_ends_before_the_meeting_is_noticed(first: Ranks, pair: Pair) -> None:
    pair[1].close()
    with pytest.raises(RankGone):
        first.meet(torch.device("cpu"))


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ("[pair.cc:553] Connection closed by peer [127.0.0.1]:13187. GLHF!", RankGone),
        ("Read error [127.0.0.1]:9097: Connection reset by peer", RankGone),
        ("Write error [127.0.0.1]:9097: Broken pipe", RankGone),
        (
            "A call failed possibly due to a network error or a remote process exiting prematurely",
            RankGone,
        ),
        ("Timed out waiting 60000ms for recv operation to complete", RankSilent),
        ("Wait timeout", RankSilent),
        ("wait timeout after 100ms, keys: /0", RankSilent),
        ("Application timeout caused pair closure", RankSilent),
        ("Received data size doesn't match expected size", RuntimeError),
        ("connect [127.0.0.1]:9: Connection refused", RuntimeError),
        ("CUDA error: an illegal memory access was encountered", RuntimeError),
    ],
)
def test_what_is_said_of_other_ranks_is_told_from_a_failure_of_ones_own(
    said: str, meant: type[Exception]
) -> None:
    with pytest.raises(Exception) as raised, others_watched():  # noqa: PT011
        raise RuntimeError(said)
    assert type(raised.value) is meant


def test_ranks_meet_on_this_host_whatever_the_environment_says(
    first: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str | None] = []
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "eth0")
    limits: list[datetime.timedelta] = []

    def init(*_: object, timeout: datetime.timedelta, **__: object) -> None:
        seen.extend(os.environ.get(name) for name in names)
        limits.append(timeout)

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    group = SimpleNamespace(WORLD=SimpleNamespace(set_timeout=limits.append))
    monkeypatch.setattr(torch.distributed, "group", group)
    first.meet(torch.device("cuda"))
    assert seen == ["lo", "lo"]
    assert [limit.total_seconds() for limit in limits] == [engine_ranks.MEETING_S, WATCHDOG_S]


def test_ranks_that_do_not_come_are_waited_for_as_long_as_a_meeting_takes(
    first: Ranks, second: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However short the watchdog is. Rank 1 has not even the way to the meeting; rank 0 is alone there."""
    monkeypatch.setattr(engine_ranks, "MEETING_S", 0.1)
    for ranks in (second, first):
        with pytest.raises(RankSilent, match=r"waited 0\.1 s for the other ranks to start, in vain"):
            ranks.meet(torch.device("cpu"))


def test_why_ranks_cannot_meet_is_told(first: Ranks, second: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not taken for the end of another rank, which would end this one without a word."""

    def refused(*_: object, **__: object) -> None:
        raise RuntimeError("connect [127.0.0.1]:9: Connection refused")

    monkeypatch.setattr(torch.distributed, "init_process_group", refused)
    with pytest.raises(RuntimeError, match="Connection refused"):
        first.meet(torch.device("cpu"))
