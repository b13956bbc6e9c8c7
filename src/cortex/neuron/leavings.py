"""Removes what a node that was killed leaves on disk: the folder with the warm server's socket.

Runs in the warm server, which outlives the node by a moment; one that ends in order does it by itself. Knows
nothing of workers.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
from multiprocessing import forkserver
from pathlib import Path
from typing import Final

_SELF: Final = os.getpid()
_NODE: Final = os.getppid()
_DYING_S: Final = 1.0
"""A process that ends closes its files, which is what ends the warm server, before it counts as gone."""


@atexit.register
def _remove() -> None:
    """Nothing where the node lives: it goes on to use the folder, for its next warm server."""
    address = forkserver._forkserver._forkserver_address  # type: ignore[attr-defined]
    if os.getpid() != _SELF or not address:
        return
    socket = Path(address)
    with contextlib.suppress(OSError):
        if _node_is_gone():
            socket.unlink()
            socket.parent.rmdir()


def _node_is_gone() -> bool:
    if os.getppid() == _NODE:
        with contextlib.suppress(ProcessLookupError):
            return bool(select.select([os.pidfd_open(_NODE)], [], [], _DYING_S)[0])
    return True
