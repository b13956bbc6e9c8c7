"""The worker's end of its socket: whole orders in, reports out. Knows no torch and no meaning."""

from __future__ import annotations

import socket
from collections import deque
from typing import Final

import msgspec

from cortex.neuron.engine.messages import Order, Report, Unframer, decode_order, frame

READ_SIZE: Final = 2**18


class PeerGone(Exception):
    """The node closed the socket, or sent what no node sends: there is nobody to work for."""


class Channel:
    """Raises PeerGone from every method once the other side is gone."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._sock = sock
        self._unframer = Unframer()
        self._orders: deque[Order] = deque()

    def next(self) -> Order:
        """The next order, waited for."""
        while not self._orders:
            self._read(0)
        return self._orders.popleft()

    def arrived(self) -> list[Order]:
        """All orders that are there, without waiting."""
        self.check()
        orders = list(self._orders)
        self._orders.clear()
        return orders

    def check(self) -> None:
        """Read what is there, so that a closed socket is noticed."""
        while self._read(socket.MSG_DONTWAIT):
            pass

    def send(self, report: Report) -> None:
        """Waits while the node is behind."""
        try:
            self._sock.sendall(frame(report))
        except OSError as error:
            raise PeerGone(f"writing failed: {error}") from None

    def _read(self, flags: int) -> bool:
        try:
            data = self._sock.recv(READ_SIZE, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise PeerGone(f"reading failed: {error}") from None
        if not data:
            raise PeerGone("the node closed the connection")
        try:
            self._orders.extend(decode_order(body) for body in self._unframer.feed(data))
        except (ValueError, msgspec.MsgspecError) as error:
            raise PeerGone(f"an order cannot be read: {error}") from None
        return True
