"""Accounts for the KV cache in blocks: which are free, who holds which, and what the idle ones still know.

Blocks that hold known tokens form a tree, the prefix cache: a path from the root spells the beginning of a
prompt. Sequences share blocks by reference; one that nobody holds keeps its place until room is needed, the
one unused for longest going first. Knows no tensors: a place is a number, and copying is somebody else's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, NamedTuple

TOGETHER: Final = 8
"""For fewer blocks to lie together nothing is forgotten."""
Tokens = tuple[int, ...]


class Block:
    """`size` tokens of cache at a place. `tokens` and `parent` are set once it is in the tree."""

    __slots__ = ("children", "holders", "parent", "place", "state", "tokens")

    def __init__(self, place: int) -> None:
        self.place = place
        self.holders = 1
        self.tokens: Tokens | None = None
        self.parent: Block | None = None
        self.children: dict[Tokens, Block] = {}
        self.state: int | None = None
        """Where the sequence's state after this block's last token is kept, if it is."""


class Match(NamedTuple):
    """What the tree knows of a prompt: whole blocks, and of one more block the first `shared` tokens."""

    chain: list[Block]
    partial: Block | None
    shared: int

    def tokens(self, size: int) -> int:
        return len(self.chain) * size + self.shared


NOTHING = Match([], None, 0)


class BlockPool:
    """`blocks` blocks of `size` tokens. Not caching, it forgets a block as soon as nobody holds it.

    `on_forget` is called with a block of the tree just before it is forgotten.
    """

    def __init__(self, blocks: int, size: int, *, caching: bool = True) -> None:
        self.on_forget: Callable[[Block], None] | None = None
        self.blocks = blocks
        self.size = size
        self.caching = caching
        self._vacant = bytearray(b"\x01" * blocks)
        self._vacancies = blocks
        self._root = Block(-1)
        self._idle: dict[Block, None] = {}
        """Known blocks that nobody holds, the longest unused first. A block stands before its parent."""

    # --- questions ---

    @property
    def available(self) -> int:
        """Blocks that can be taken now, those included that would have to be forgotten for it."""
        return self._vacancies + len(self._idle)

    @property
    def vacant(self) -> int:
        """Blocks that nobody holds and that nothing is known of: taking them costs nobody anything."""
        return self._vacancies

    @property
    def held(self) -> int:
        return self.blocks - self.available

    @property
    def idle(self) -> int:
        return len(self._idle)

    def count_for(self, tokens: int) -> int:
        """Blocks that so many tokens take."""
        return -(-tokens // self.size)

    def match(self, tokens: Sequence[int]) -> Match:
        """The longest known beginning of `tokens`, of which the last one is always left to compute."""
        if not self.caching:
            return NOTHING
        limit, node, chain, at = len(tokens) - 1, self._root, list[Block](), 0
        while at + self.size <= limit:
            found = node.children.get(tuple(tokens[at : at + self.size]))
            if found is None:
                break
            chain.append(found)
            node, at = found, at + self.size
        partial, count = _longest(node, tuple(tokens[at : min(limit, at + self.size)]))
        return Match(chain, partial, count)

    def idle_in(self, chain: Iterable[Block]) -> int:
        """How many blocks of a chain nobody holds: holding them makes so many less available."""
        return sum(not block.holders for block in chain)

    # --- changes ---

    def take(self, count: int, after: Block | None = None) -> list[Block]:
        """Blocks for one holder; in consecutive places where possible, the first one right `after` another.
        For that up to as many again are forgotten: holes between others would be filled piece by piece.

        Raises ValueError if fewer are available.
        """
        if count > self.available:
            raise ValueError(f"{count} blocks were asked for and {self.available} are available")
        while self._vacancies < count:
            self._forget(next(iter(self._idle)))
        taken: list[Block] = []
        if after is not None:
            place = after.place + 1
            while len(taken) < count and place < self.blocks and self._vacant[place]:
                taken.append(self._occupy(place))
                place += 1
        run = count - len(taken)
        for _ in range(min(run, len(self._idle)) if run >= TOGETHER else 0):
            if self._vacant.find(b"\x01" * run) >= 0:
                break
            self._forget(next(iter(self._idle)))
        while len(taken) < count:
            run = min(run, count - len(taken))
            first = self._vacant.find(b"\x01" * run)
            if first < 0:
                run = (run + 1) // 2
                continue
            taken += [self._occupy(place) for place in range(first, first + run)]
        return taken

    def hold(self, chain: Iterable[Block]) -> None:
        for block in chain:
            if not block.holders:
                del self._idle[block]
            block.holders += 1

    def release(self, blocks: Sequence[Block]) -> None:
        """Give up one hold on each block of a sequence, first block first."""
        for block in reversed(blocks):
            if block.holders < 1:
                raise ValueError(f"block {block.place} is released and nobody holds it")
            block.holders -= 1
            if not block.holders:
                if block.tokens is None:
                    self._vacate(block)
                else:
                    self._idle[block] = None

    def learn(self, block: Block, parent: Block | None, tokens: Tokens) -> Block:
        """A held block's contents are known now: `tokens` after those of `parent` (None at the start).

        Returns the block that stands for them in the tree from now on, with the caller's hold on it: the
        block itself or, where another one holds the same, that one. Fewer tokens than a block's size
        are an end: nothing is ever attached to it.
        """
        above = self._root if parent is None else parent
        known = above.children.get(tokens)
        if known is not None:
            self.hold([known])
            self.release([block])
            return known
        for sibling in [s for t, s in above.children.items() if len(t) < self.size and tokens[: len(t)] == t]:
            if not sibling.holders:
                self._forget(sibling)  # an end that the block goes on from is of no more use
        block.tokens, block.parent = tokens, above
        above.children[tokens] = block
        return block

    def forget_idle(self) -> None:
        """Empty the prefix cache of everything that nobody holds."""
        while self._idle:
            self._forget(next(iter(self._idle)))

    def _forget(self, block: Block) -> None:
        if block.children or block.parent is None or block.tokens is None:
            raise AssertionError("an idle block has nothing below it in the tree")
        if self.on_forget is not None:
            self.on_forget(block)
        del self._idle[block]
        del block.parent.children[block.tokens]
        block.tokens = block.parent = None
        self._vacate(block)

    def _occupy(self, place: int) -> Block:
        self._vacant[place] = 0
        self._vacancies -= 1
        return Block(place)

    def _vacate(self, block: Block) -> None:
        self._vacant[block.place] = 1
        self._vacancies += 1

    # --- checks ---

    def check(self, holders: Iterable[Sequence[Block]]) -> None:
        """Raises AssertionError unless the books agree with `holders`, the blocks of every sequence."""
        counts: dict[Block, int] = {}
        for blocks in holders:
            for block in blocks:
                counts[block] = counts.get(block, 0) + 1
        tree = list(self._walk(self._root))
        living = {*tree, *counts}
        places = [block.place for block in living]
        assert len(set(places)) == len(places), "two blocks have one place"
        assert all(not self._vacant[place] for place in places), "a block's place is free"
        assert sum(self._vacant) == self._vacancies == self.blocks - len(places), "places are lost"
        assert all(block.holders == counts.get(block, 0) for block in living), "holders are miscounted"
        assert set(self._idle) == {block for block in tree if not block.holders}, "idle blocks are wrong"
        seen: set[Block] = set()
        for block in self._idle:
            assert seen.issuperset(block.children.values()), "a block would be forgotten before its children"
            seen.add(block)

    def _walk(self, block: Block) -> Iterable[Block]:
        for child in block.children.values():
            yield child
            yield from self._walk(child)


def _longest(node: Block, tokens: Tokens) -> tuple[Block | None, int]:
    """The child that begins most like `tokens`, and how many tokens they share."""
    best: Block | None = None
    most = 0
    for known, child in node.children.items():
        if tokens and known[0] == tokens[0]:
            shared = common(known, tokens)
            if shared > most:
                best, most = child, shared
    return best, most


def breaks(blocks: Sequence[Block]) -> int:
    """How often the next block of a sequence does not lie right after the one before it."""
    return sum(after.place != before.place + 1 for before, after in itertools.pairwise(blocks))


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike; compares slices, the work of C."""
    low, high = 0, min(len(one), len(other))
    if one[:high] == other[:high]:
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle
    return low
