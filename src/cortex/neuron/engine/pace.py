"""How many prompt tokens a step may take on, so that those who decode beside them hardly notice.

Learns from the steps that were made what decode and prefill cost on this machine. Knows no sequences.
"""

from __future__ import annotations

from typing import Final

STRETCH: Final = 2.2
"""A step with prefill in it takes at most about so many times one that only decodes."""
MEMORY: Final = 0.3
"""Weight of the newest step in what is believed of the next."""
LEAST: Final = 16
"""Tokens: a prompt goes on by this much however slow the steps are."""
UNKNOWN: Final = 64
SHORTEST: Final = 1e-9
"""Seconds: no step takes less, whatever the clock says."""


class Pace:
    """`most` prompt tokens go into any one step."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._decode: float | None = None
        self._prefill: float | None = None

    def budget(self, decoding: int) -> int:
        """Prompt tokens for a step in which `decoding` sequences decode."""
        if not decoding:
            return self._most
        if self._decode is None or self._prefill is None:
            return min(self._most, UNKNOWN)
        spare = (STRETCH - 1) * self._decode
        return max(min(LEAST, self._most), min(self._most, int(spare / self._prefill)))

    def made(self, seconds: float, decoding: int, prefill: int) -> None:
        """A step with so many of each took `seconds`."""
        if not prefill:
            self._decode = _blend(self._decode, seconds)
        elif prefill >= min(LEAST, self._most):
            beside = (self._decode or 0.0) if decoding else 0.0
            self._prefill = _blend(self._prefill, max(seconds - beside, seconds / 8, SHORTEST) / prefill)


def _blend(known: float | None, new: float) -> float:
    return new if known is None else known + MEMORY * (new - known)
