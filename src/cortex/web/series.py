"""Labelled series over aioprometheus that are cheap to update: a request costs lookups, not label parsing.

Counters and gauges are plain numbers that reach their collector when it is rendered. Knows no names.
"""

from __future__ import annotations

from aioprometheus import histogram
from aioprometheus.collectors import Collector, Histogram

Key = tuple[str, ...]
"""Label values, in the order of the label names."""


class Numbers:
    """The series of one counter or gauge."""

    def __init__(self, collector: Collector, *labels: str) -> None:
        self._collector = collector
        self._labels = labels
        self._values: dict[Key, float] = {}

    def add(self, key: Key, amount: float = 1) -> None:
        self._values[key] = self._values.get(key, 0) + amount

    def flush(self) -> None:
        """Hand the values to the collector; to be called before it is rendered."""
        for key, value in self._values.items():
            self._collector.set_value(dict(zip(self._labels, key, strict=True)), value)


class Distributions:
    """The series of one histogram."""

    def __init__(self, collector: Histogram, *labels: str) -> None:
        self._collector = collector
        self._labels = labels
        self._children: dict[Key, histogram.Histogram] = {}

    def observe(self, key: Key, value: float) -> None:
        child = self._children.get(key)
        if child is None:
            child = self._children[key] = histogram.Histogram(*self._collector.upper_bounds)
            self._collector.set_value(dict(zip(self._labels, key, strict=True)), child)
        child.observe(value)
