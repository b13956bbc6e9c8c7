"""llama.cpp by its Python wheel `xllamacpp`: its own server's scheduler, without HTTP in between.

All settings are its defaults but threads, slots and context, and its caches between requests are off.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import xllamacpp

from .adapter import CONTEXT, STREAMS, THREADS, Trace
from .models import Prompt


class LlamaCpp:
    def __init__(self) -> None:
        self._server: xllamacpp.Server | None = None

    async def load(self, path: str) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = path
        params.n_ctx = STREAMS * CONTEXT
        params.n_parallel = STREAMS
        params.cpuparams.n_threads = THREADS
        params.cpuparams_batch.n_threads = THREADS
        params.cont_batching = True
        params.cache_prompt = False
        params.cache_ram_mib = 0  # or it copies each slot's cache aside when the next request takes it
        params.verbosity = 0
        self._server = await asyncio.to_thread(xllamacpp.Server, params)

    async def generate(self, prompt: Prompt, tokens: int, trace: Trace) -> None:
        assert self._server is not None
        body = {
            "prompt": prompt["ids"],
            "n_predict": tokens,
            "temperature": 0.0,
            "ignore_eos": True,
            "cache_prompt": False,
            "stream": True,
        }
        pieces: list[str] = []

        def seen(piece: str) -> None:
            trace.mark()
            pieces.append(piece)

        await asyncio.to_thread(self._server.handle_completions, json.dumps(body), seen)
        last = json.loads(pieces[-1])
        if "usage" not in last:
            raise RuntimeError(f"llama.cpp answered {pieces[-1][:300]}")
        trace.times.pop()  # the closing piece brings no token
        trace.generated = last["usage"]["completion_tokens"]
        trace.prompt_tokens = last["usage"]["prompt_tokens"]
        timings = last["timings"]
        trace.own = {"prefill": timings["prompt_per_second"], "decode": timings["predicted_per_second"]}

    async def close(self) -> None:
        self._server = None  # its threads end with it

    def facts(self) -> dict[str, Any]:
        return {"version": xllamacpp.__version__}
