"""Divides CPU threads among those who compute side by side: models on a node, ranks of a model.

Knows neither.
"""

from __future__ import annotations


def thread_share(threads: int, place: int, among: int) -> int:
    """The part of the one at `place`, at least 1; those left over go to the first ones."""
    return max(1, threads // among + (place < threads % among))
