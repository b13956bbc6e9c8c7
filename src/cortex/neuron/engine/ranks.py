"""The ranks of a model among themselves: how they meet, and step plans on their way from rank 0.

Rank 0 alone reads, schedules and samples; the others execute what they are sent. Plans go over sockets that
the node has laid from rank 0 to each of them: a rank that waits for work there costs nothing, and sees at
once that rank 0 has ended. Knows plans, neither the model nor where orders come from.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final, TypeVar

import msgspec
import torch
import torch.distributed as dist

from cortex.neuron.engine.messages import Unframer, framed
from cortex.neuron.nn.parallel import RankGone, RankSilent, be_patient, others_watched
from cortex.neuron.nn.placement import Share
from cortex.neuron.nn.plan import StepPlan

WATCHDOG_S: Final = 60.0
"""A rank that keeps the others waiting for so long in a step is given up, and with it the model."""
MEETING_S: Final = 60.0
"""For the other ranks to start."""
GRACE_S: Final = 5.0
"""Once more, after a wait in vain: while ranks were stopped together, by a terminal or with their container,
the clock went on, and nobody is at fault."""
_FOR_EVER_S: Final = 86_400.0
_READ: Final = 2**16
_REST: Final = b""
"""In place of a plan: the next one may take its time."""

_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(StepPlan)

T = TypeVar("T")


class Ranks:
    """The way to the other ranks of a model; alone, plans go nowhere.

    `links` are rank 0's sockets to each other rank, or another rank's one to rank 0.
    """

    def __init__(
        self, share: Share, links: Sequence[socket.socket] = (), *, watchdog_s: float = WATCHDOG_S
    ) -> None:
        """Raises ValueError if there are not as many links as that takes."""
        expected = 1 if share.rank else share.world - 1
        if len(links) != expected:
            raise ValueError(f"rank {share.rank} of {share.world} has {len(links)} links, not {expected}")
        self._share = share
        self._links = tuple(links)
        self._watchdog_s = watchdog_s
        self._grace_s = min(GRACE_S, watchdog_s)
        self._resting = True

    @property
    def others(self) -> int:
        return self._share.world - 1

    def meet(self, device: torch.device) -> None:
        """Join the other ranks for collectives on `device`.

        They find each other in a file that is nowhere on disk and known to nobody else; rank 0 hands it on.
        Raises RankGone, RankSilent if one does not come, RuntimeError if there is no way between them.
        """
        if not self.others:
            return
        for link in self._links:
            link.settimeout(MEETING_S)
        try:
            file = self._receive_file() if self._share.rank else self._hand_out_file()
            with others_watched():
                self._join(device, file)
        except (TimeoutError, RankSilent):
            raise RankSilent(f"waited {MEETING_S:g} s for the other ranks to start, in vain") from None
        for link in self._links:
            link.settimeout(None if self._share.rank else self._watchdog_s)

    def _hand_out_file(self) -> int:
        file = os.memfd_create("ranks")
        for link in self._links:
            try:
                socket.send_fds(link, [b"\0"], [file])
            except ConnectionError as error:
                raise RankGone(str(error)) from None
        return file

    def _receive_file(self) -> int:
        try:
            _, files, _, _ = socket.recv_fds(self._links[0], 1, 1)
        except ConnectionError:
            files = []
        if not files:
            raise RankGone("rank 0 has ended")
        return files[0]

    def _join(self, device: torch.device, file: int) -> None:
        # Whatever the environment says for programs that span hosts: these ranks never leave this one.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "lo"
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.FileStore(f"/proc/self/fd/{file}", self._share.world),  # type: ignore[attr-defined]
            rank=self._share.rank,
            world_size=self._share.world,
            timeout=datetime.timedelta(seconds=MEETING_S),
        )
        group = dist.group.WORLD
        assert group is not None
        limit_s = self._watchdog_s
        if device.type == "cpu":
            be_patient(self._watchdog_s, self._grace_s)
            limit_s = _FOR_EVER_S  # gloo gives up for good where it does; those who wait for it need not
        group.set_timeout(datetime.timedelta(seconds=limit_s))

    def tell(self, plan: StepPlan) -> None:
        """From rank 0: what all compute next. Raises RankGone, RankSilent."""
        if self._links:
            self._send(_encoder.encode(plan))
            self._resting = False

    def rest(self) -> None:
        """From rank 0: it waits for work now, for as long as that takes. Raises RankGone, RankSilent."""
        if self._links and not self._resting:
            self._send(_REST)
            self._resting = True

    def plans(self) -> Iterator[StepPlan]:
        """On the other ranks: plan after plan until rank 0 ends. Raises RankSilent."""
        (link,) = self._links
        unframer = Unframer()
        while data := self._receive(link):
            for body in unframer.feed(data):
                link.settimeout(self._watchdog_s if body else None)
                if body:
                    yield _decoder.decode(body)

    def _send(self, body: bytes) -> None:
        data = framed(body)
        for link in self._links:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[self._patiently(link, partial(link.send, rest)) :]
            except TimeoutError:
                raise RankSilent("waited for another rank in vain") from None
            except OSError as error:
                raise RankGone(f"its link fails: {error}") from None

    def _patiently(self, link: socket.socket, act: Callable[[], T]) -> T:
        """Do something with a link, which may take as long as it allows, and then the grace."""
        with contextlib.suppress(TimeoutError):
            return act()
        allowed = link.gettimeout()
        link.settimeout(self._grace_s)
        try:
            return act()
        finally:
            link.settimeout(allowed)

    def _receive(self, link: socket.socket) -> bytes:
        try:
            return self._patiently(link, partial(link.recv, _READ))
        except TimeoutError:
            raise RankSilent("waited for rank 0 in vain") from None
        except ConnectionError:
            return b""
