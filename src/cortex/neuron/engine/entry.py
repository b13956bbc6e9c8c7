"""The first thing that runs in a worker process: ties it to its parent and readies the device.

Knows no torch until the environment is set; reaches the worker by name.
"""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import socket
from collections.abc import Sequence
from typing import Final

WORKER: Final = "cortex.neuron.engine.worker"
_PR_SET_PDEATHSIG: Final = 1


def main(sock: socket.socket, device: str, threads: int, links: Sequence[socket.socket] = ()) -> None:
    """Run a worker on `device` (`cpu` or a CUDA uuid) until `sock` closes, then end the process.

    `links` lead to the other ranks of its model, see `ranks`. Nothing that the process owns needs saving,
    so it ends without clean-up: every byte goes back.
    """
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device
    try:
        importlib.import_module("torch").set_num_threads(threads)
        importlib.import_module(WORKER).run(sock, links)
    except BaseException:
        logging.getLogger(__name__).exception("the worker ended by an error of its own")
        os._exit(1)
    os._exit(0)


def _die_with_parent() -> None:
    """The kernel kills this process when its parent ends, however that ends."""
    parent = os.getppid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the kernel knew
        os._exit(1)
