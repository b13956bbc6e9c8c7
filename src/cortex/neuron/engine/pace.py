"""How many prompt tokens a step may take on, so that those who decode beside them hardly notice.

Learns from the steps that were made what decode and prefill cost on this machine. Knows no sequences.
"""

from __future__ import annotations

from typing import Final

STRETCH: Final = 2.2
"""A step with prefill in it takes at most about so many times one in which a full batch decodes."""
MEMORY: Final = 0.3
"""Weight of the newest step in what is believed of the next."""
LEAST: Final = 32
"""Tokens: a prompt goes on by this much however slow the steps are; fewer cost hardly less."""
UNKNOWN: Final = 64
SHORTEST: Final = 1e-9
"""Seconds: no step takes less, whatever the clock says."""


class Pace:
    """`most` prompt tokens go into any one step."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._decode: dict[int, float] = {}
        """Seconds of a step that only decodes, by the number of its sequences."""
        self._prefill: float | None = None
        """Seconds of a prompt's token."""

    def budget(self, decoding: int) -> int:
        """Prompt tokens for a step in which `decoding` sequences decode."""
        if not decoding:
            return self._most
        if not self._decode or self._prefill is None:
            return min(self._most, UNKNOWN)
        spare = STRETCH * max(self._decode.values()) - self._beside(decoding)
        return max(min(LEAST, self._most), min(self._most, int(spare / self._prefill)))

    def made(self, seconds: float, decoding: int, prefill: int) -> None:
        """A step with so many of each took `seconds`."""
        if not prefill:
            self._decode[decoding] = _blend(self._decode.get(decoding), seconds)
        elif prefill >= min(LEAST, self._most):
            own = max(seconds - self._beside(decoding), seconds / 8, SHORTEST)
            self._prefill = _blend(self._prefill, own / prefill)

    def _beside(self, decoding: int) -> float:
        """Seconds that so many sequences decode in: those of the most similar batch that is known."""
        if not decoding or not self._decode:
            return 0.0
        return self._decode[min(self._decode, key=lambda known: abs(known - decoding))]


def _blend(known: float | None, new: float) -> float:
    return new if known is None else known + MEMORY * (new - known)
