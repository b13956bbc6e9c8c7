"""Log probabilities of a reply's tokens in OpenAI's shape, each kept until its text goes out.

Knows at which character of the reply a token begins. Knows neither how tokens become text nor why text
is held back.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Final

from cortex.hookspecs import Codec, TokenLogprobs
from cortex.wire.chat import ContentLogprob, TokenLogprob

LOWEST: Final = -9999.0
"""Stands for a probability of zero, whose logarithm JSON cannot hold; OpenAI and vLLM send the same."""


class PendingLogprobs:
    """Tokens that were decoded and not yet shown, one reply's.

    A token is shown when the text that was sent reaches beyond its beginning; one that adds only a part
    of a character begins where that character will stand. So tokens that a stop string cut off are never
    shown, and a stop string that was only suspected delays them as it delays their text.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self._decoded = 0
        self._sent = 0
        self._waiting: deque[tuple[int, TokenLogprobs]] = deque()

    def add(self, token: TokenLogprobs, text: str) -> None:
        """The next token; `text` is what became readable with it."""
        self._waiting.append((self._decoded, token))
        self._decoded += len(text)

    def shown_by(self, text: str) -> list[ContentLogprob]:
        """The tokens that go out with `text`, the next of the reply that is sent."""
        self._sent += len(text)
        found = []
        while self._waiting and self._waiting[0][0] < self._sent:
            found.append(self._entry(self._waiting.popleft()[1]))
        return found

    def rest(self) -> list[ContentLogprob]:
        """All others, where the reply ends with its last token: those that spell nothing."""
        found = [self._entry(token) for _, token in self._waiting]
        self._waiting.clear()
        return found

    def _entry(self, token: TokenLogprobs) -> ContentLogprob:
        return ContentLogprob(
            **self._named(token.id, token.logprob),
            top_logprobs=[TokenLogprob(**self._named(id, logprob)) for id, logprob in token.top],
        )

    def _named(self, id: int, logprob: float) -> dict[str, Any]:
        spelled = self._codec.token_bytes(id)
        return {
            "token": spelled.decode("utf-8", "replace"),
            "logprob": max(logprob, LOWEST),
            "bytes": list(spelled) or None,
        }
