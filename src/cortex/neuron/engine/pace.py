"""How many prompt tokens a step may take on, so that those who decode beside them hardly notice.

Aims at a time: a step with prefill in it may take so many times what one takes in which a full batch decodes.
Learns from the steps that were made, and makes the next chunk larger or smaller. Knows no sequences.
"""

from __future__ import annotations

from typing import Final

STRETCH: Final = 2.4
"""What a step with prefill in it may take, in steps in which a full batch decodes."""
MEMORY: Final = 0.3
"""Weight of the newest step in what is believed of decode."""
FIRST: Final = 64
"""Tokens, as long as nothing is known."""
LEAST: Final = 8
"""Tokens: a prompt goes on by this much however slow the steps are."""
GROW: Final = 1.5
SHRINK: Final = 0.5
"""From one step to the next a chunk becomes at most so many times as large."""


class Pace:
    """`most` prompt tokens go into any one step."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._chunk = float(FIRST)
        self._decode: dict[int, float] = {}
        """Seconds of a step that only decodes, by the number of its sequences."""

    def budget(self, decoding: int) -> int:
        """Prompt tokens for a step in which `decoding` sequences decode."""
        return min(self._most, int(self._chunk)) if decoding else self._most

    def made(self, seconds: float, decoding: int, prefill: int) -> None:
        """A step with so many of each took `seconds`."""
        if not prefill:
            known = self._decode.get(decoding, seconds)
            self._decode[decoding] = known + MEMORY * (seconds - known)
        elif decoding and self._decode:
            aim = STRETCH * max(self._decode.values())
            change = max(SHRINK, min(GROW, aim / seconds)) if seconds > 0 else GROW
            if change < 1:
                self._chunk = max(LEAST, min(self._chunk, prefill * change))
            elif prefill >= int(self._chunk):  # the short end of a prompt says nothing of longer chunks
                self._chunk = min(self._most, self._chunk * change)
