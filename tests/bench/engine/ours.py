"""This project's engine, as a neuron runs it: the factory, a worker process, batches of token ids.

Its default form, or another one by `quant`.
"""

# Before anything that imports torch: it sets how torch's threads wait for each other.
import cortex.neuron.engine  # noqa: F401  isort: skip

import os
from collections.abc import Callable
from typing import Any

from cortex import __version__
from cortex.hookspecs import EngineStep, LoadedModel, LoadOrder, Sampling
from cortex.neuron.torch_engine import TorchFactory

from .adapter import STREAMS, THREADS, Trace
from .models import Prompt
from .subjects import PROMPT_LOOKUP


class Ours:
    def __init__(self, quant: str | None = None) -> None:
        self._quant = quant
        self._factory: TorchFactory | None = None
        self._model: LoadedModel | None = None
        self._requests = 0

    async def load(self, path: str) -> None:
        """A node starts its factory once and loads many models with it; so the first load here is longer."""
        if self._factory is None:
            self._factory = TorchFactory()
            await self._factory.start()
        order = LoadOrder(
            model_id="bench",
            path=path,
            threads=THREADS,
            quant=self._quant,
            max_running=STREAMS,
            options={"prompt_lookup": os.environ.get(PROMPT_LOOKUP) != "off"},
        )
        self._model = await self._factory.load(self._factory.plan(order), lambda progress: None)

    async def generate(self, prompt: Prompt, tokens: int, trace: Trace) -> None:
        assert self._model is not None
        self._requests += 1
        sampling = Sampling(max_tokens=tokens, temperature=0.0, stop_ids=())
        async for batch in self._model.engine.generate(f"bench-{self._requests}", prompt["ids"], sampling):
            if batch.ids:
                trace.mark(len(batch.ids))
            trace.ids += batch.ids

    def watch(self, seen: Callable[[EngineStep], None]) -> None:
        assert self._model is not None
        self._model.watch(seen)

    async def close(self) -> None:
        if self._model is not None:
            await self._model.close()
            self._model = None

    def facts(self) -> dict[str, Any]:
        return {"version": __version__}


def default() -> Ours:
    return Ours()


def int8() -> Ours:
    return Ours("int8")
