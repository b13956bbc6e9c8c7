"""Readiness, told the way systemd asks for it: a datagram to the socket that NOTIFY_SOCKET names.

`cortex up` listens to its children in the same way. Protocol: sd_notify(3).
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

READY: Final = "READY=1"
STOPPING: Final = "STOPPING=1"


def notify(*lines: str, environ: Mapping[str, str] = os.environ) -> None:
    """Sends the lines as one message; does nothing where nobody asked for it or listens any more."""
    name = environ.get("NOTIFY_SOCKET")
    if not name:
        return
    address = "\0" + name[1:] if name.startswith("@") else name
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.connect(address)
        sender.send("\n".join(lines).encode())


class Listener:
    """The receiving end, on an abstract address that the kernel chooses and frees by itself."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self._socket.bind("")
        self.variable = "@" + self._socket.getsockname()[1:].decode()
        """What NOTIFY_SOCKET must be set to."""

    def fileno(self) -> int:
        return self._socket.fileno()

    def take(self) -> list[str]:
        """The lines of one message; empty if none has come."""
        try:
            return self._socket.recv(4096).decode("utf-8", "replace").split("\n")
        except BlockingIOError:
            return []

    def close(self) -> None:
        self._socket.close()
