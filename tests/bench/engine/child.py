"""An engine's own process: reads orders as JSON lines, answers each with one, idles in between.

Run as `python -m engine.child NAME`; ends with its parent or when its input ends. Standard output is for
answers alone: what the libraries print there goes to standard error.
"""

from __future__ import annotations

import asyncio
import ctypes
import importlib
import json
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, TextIO

from . import agents, interference, probes

ADAPTERS: Final = {
    "ours": ("ours", "default"),
    "ours-int8": ("ours", "int8"),
    "llama.cpp": ("llama_cpp", "LlamaCpp"),
    "mistral.rs": ("mistral_rs", "MistralRs"),
}
"""Subject -> module and what makes its adapter there. Imported in the child alone: they bring libraries."""
_ORDERS: Final = {
    "load": probes.load,
    "prefill": probes.prefill,
    "decode": probes.decode,
    "streams": probes.streams,
    "first_token": probes.first_token,
    "agents": agents.measure,
    "interference": interference.measure,
}
_THREADS: Final = 16
"""For engines that block: one for each stream and some to spare."""
_SET_PDEATHSIG: Final = 1


def main(name: str) -> None:
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    asyncio.run(_serve(name, answers))


async def _serve(name: str, answers: TextIO) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_THREADS))
    adapter: Any = None
    while line := await asyncio.to_thread(sys.stdin.readline):
        order = json.loads(line)
        try:
            if adapter is None:
                module, make = ADAPTERS[name]
                adapter = getattr(importlib.import_module(f".{module}", __package__), make)()
            answer = await _ORDERS[order.pop("order")](adapter, **order)
        except Exception as error:  # whatever a foreign engine raises: the parent reports it
            answer = {"error": _said(error)}
        answers.write(json.dumps(answer) + "\n")
    if adapter is not None:
        await adapter.close()


def _said(error: BaseException) -> str:
    """The innermost error of a group, and of a message with a backtrace the first line."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    message = str(getattr(error, "message", error)).partition("\n")[0]
    return f"{type(error).__name__}: {message[:300]}"


if __name__ == "__main__":
    main(sys.argv[1])
