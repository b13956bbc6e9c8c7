"""mistral.rs by its Python wheel `mistralrs`, which blocks its caller: a thread for each stream.

It takes text and no ids, and wraps every prompt in the chat template; a template that is the bare text
leaves the prompt as it is.
"""

from __future__ import annotations

import os

# It looks for both when it starts; the first keeps it off the network, the second to the cores allowed.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAYON_NUM_THREADS"] = "2"

import asyncio
import importlib.metadata
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

import mistralrs

from .adapter import STREAMS, Trace
from .models import Prompt

_BARE: Final = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


class MistralRs:
    def __init__(self) -> None:
        self._runner: mistralrs.Runner | None = None
        # Several prompts in one step fail in 0.9.5 on CPU ("input tensor is not contiguous"), and two threads
        # may not be inside the call that sends. So a prompt is sent when the one before it has been read.
        self._reading = threading.Lock()

    async def load(self, path: str) -> None:
        self._runner = await asyncio.to_thread(_runner, Path(path))

    async def generate(self, prompt: Prompt, tokens: int, trace: Trace) -> None:
        await asyncio.to_thread(self._generate, prompt["text"], tokens, trace)

    def _generate(self, text: str, tokens: int, trace: Trace) -> None:
        assert self._runner is not None
        request = mistralrs.ChatCompletionRequest(
            messages=text, model="default", max_tokens=tokens, temperature=0.0, stream=True, ignore_eos=True
        )
        with self._reading:
            chunks = iter(self._runner.send_chat_completion_request(request))
            first = next(chunks)
            trace.mark()
        usage = first.usage
        for chunk in chunks:
            trace.mark()
            usage = chunk.usage or usage
        if usage is None:
            raise RuntimeError("mistral.rs ended without telling what it has done")
        trace.generated = usage.completion_tokens
        trace.prompt_tokens = usage.prompt_tokens
        trace.own = {"prefill": usage.avg_prompt_tok_per_sec, "decode": usage.avg_compl_tok_per_sec}

    async def close(self) -> None:
        self._runner = None

    def facts(self) -> dict[str, Any]:
        return {"version": importlib.metadata.version("mistralrs")}


def _runner(path: Path) -> mistralrs.Runner:
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(_BARE)
        template.flush()
        return mistralrs.Runner(
            which=mistralrs.Which.GGUF(str(path.parent), path.name),
            max_seqs=STREAMS,
            prefix_cache_n=0,
            token_source="none",
            jinja_explicit=template.name,
        )
