"""Models from the Hugging Face hub: fetched into its cache by a program that runs beside the node.

The program (`hub_process`) is the only one that imports huggingface_hub; it ends with its caller, however
that ends. Token, mirror and the cache's place come from the environment, as for every tool of theirs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

import msgspec

from cortex.neuron.hub_files import Repository, without_queries
from cortex.neuron.pip_process import TIED
from cortex.neuron.references import Report
from cortex.wire.errors import BadRequest, CortexError, Forbidden, LoadFailed, UnknownModel
from cortex.wire.node import Progress

PROGRAM: Final = "cortex.neuron.hub_process"
_QUIET: Final = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "PYTHONUNBUFFERED": "1",
}
_REFUSALS: Final[dict[str, type[CortexError]]] = {
    kind.__name__: kind for kind in (BadRequest, Forbidden, UnknownModel, LoadFailed)
}


class HubCache:
    """The cache that all tools of Hugging Face share."""

    def __init__(self, *, endpoint: str | None = None, folder: Path | None = None) -> None:
        """Without them the environment says which hub and where (HF_ENDPOINT, HF_HUB_CACHE, HF_HOME)."""
        self._endpoint = endpoint
        self._folder = folder

    async def fetch(self, repository: Repository, report: Report) -> Path:
        """What to open of the model. One that is cached needs no network.

        Cancelling ends the download; the next one goes on where it stopped. Raises UnknownModel, Forbidden
        (gated), BadRequest (several files would do), LoadFailed (no way to the hub, a wrong hash, a full
        disk).
        """
        order = {
            "repository": repository,
            "endpoint": self._endpoint,
            "cache": None if self._folder is None else str(self._folder),
        }
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", TIED, str(os.getpid())),
            *(sys.executable, "-P", "-m", PROGRAM, msgspec.json.encode(order).decode()),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **_QUIET},
            start_new_session=True,
        )
        try:
            last, complaint = await asyncio.gather(_follow(process, report), _read(process.stderr))
            await process.wait()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
        return _outcome(last, complaint, repository)


async def _follow(process: asyncio.subprocess.Process, report: Report) -> dict[str, Any]:
    """Pass the program's progress on; give the last that it said."""
    assert process.stdout is not None
    said: dict[str, Any] = {}
    async for line in process.stdout:
        said = msgspec.json.decode(line, type=dict[str, Any])
        if "total" in said:
            report(Progress(phase="downloading", done=said["done"], total=said["total"]))
    return said


async def _read(stream: asyncio.StreamReader | None) -> str:
    assert stream is not None
    return (await stream.read()).decode("utf-8", "replace")


def _outcome(said: dict[str, Any], complaint: str, repository: Repository) -> Path:
    if "path" in said:
        return Path(said["path"])
    if "error" in said:
        raise _REFUSALS.get(said["error"], LoadFailed)(said["message"], param=said["param"] or None)
    if "No module named 'huggingface_hub'" in complaint:
        raise LoadFailed(
            "Fetching from the Hugging Face hub takes huggingface_hub, which is not installed: "
            "pip install 'helexa-cortex[neuron]'."
        )
    last = without_queries((complaint.strip().splitlines() or ["it said nothing"])[-1])
    raise LoadFailed(f"Fetching {repository.name} from the hub failed: {last}.")
