"""The catalogue: which models the operator has named, and under which aliases.

Knows nothing of nodes: what is loaded where is the fleet's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec

from cortex.wire.node import Limit


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One model of `models.toml`. `limit` and `capabilities` stand in where no node has reported any."""

    id: str
    source: str | None = None
    harness: str = "torch"
    limit: Limit | None = None
    cost: Mapping[str, float] | None = None
    capabilities: tuple[str, ...] = ()


class Catalogue:
    def __init__(self, entries: Iterable[Entry] = (), aliases: Mapping[str, str] | None = None) -> None:
        self._entries = {entry.id: entry for entry in entries}
        self.aliases: Mapping[str, str] = dict(aliases or {})

    @property
    def entries(self) -> Mapping[str, Entry]:
        return self._entries

    def resolve(self, name: str) -> str:
        """The model id that a client's name stands for. Aliases do not chain."""
        return self.aliases.get(name, name)
