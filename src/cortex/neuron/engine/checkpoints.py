"""Accounts for the states of sequences: the slot of each running one, and what is kept of them for later.

A state is what recurrent layers carry on, or what layers with a window still see. A checkpoint is the state
after the last token of a block. It stands at the block, so that the prefix cache finds both together, and
goes when the block goes, or when room is needed, the one unused for longest first. Knows no tensors: copies
are listed, and somebody else makes them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from cortex.neuron.engine.blocks import NOTHING, Block, Match
from cortex.neuron.nn.plan import NO_SLOT, StateCopy

APART: Final = 64
"""Tokens. What lies closer together is computed sooner than two states are copied."""


class StateBooks:
    """`working` slots where sequences run, and after them `kept` places on the host for checkpoints, which
    slots that nobody runs in are too. A model without states has none, and everything here then does nothing.

    `block` is the size of blocks in tokens, `apart` how many tokens there are at least between two marks.
    No step computes tokens of a sequence on both sides of a multiple of `stride`, if that is not None.
    """

    def __init__(
        self,
        working: int = 0,
        kept: int = 0,
        *,
        block: int = 1,
        apart: int = APART,
        stride: int | None = None,
    ) -> None:
        self.active: Final = working > 0
        self.stride: Final = stride
        self._block = block
        self._apart = apart
        self._working = working
        self._slots = working + kept
        self._free = list(reversed(range(working)))
        self._spare = list(reversed(range(working, working + kept)))
        self._kept: dict[Block, int] = {}
        """Blocks with a checkpoint, the longest unused first, and how many tokens its state has seen."""
        self._copies: list[StateCopy] = []

    @property
    def kept(self) -> int:
        return len(self._kept)

    def take_copies(self) -> list[StateCopy]:
        """What is to be copied before anything else is computed, in this order: one slot to another."""
        copies, self._copies = self._copies, []
        return copies

    # --- a sequence's slot ---

    def begin(self, match: Match) -> int:
        """A slot for a sequence of which `match`, as `usable` gave it, is known already."""
        if not self.active:
            return NO_SLOT
        known = [block for block in _path(match) if block.state is not None]
        if not known:
            return self._make_way()
        last, tokens = known[-1], match.tokens(self._block)
        source = last.state
        assert source is not None
        self._touch(last)
        slot = self._make_way()
        if slot != source:  # else there was no other slot, and the sequence goes on in this one
            self._copies.append(StateCopy(source, slot, tokens))
        if known[0].state is not None:
            self._touch(known[0])  # the system prompt's goes last of all
        return slot

    def end(self, slot: int) -> None:
        """The sequence needs its state no more, and nobody else does."""
        if slot != NO_SLOT:
            self._free.append(slot)

    def leave(self, slot: int, block: Block, tokens: int) -> None:
        """The sequence has ended with this state after its `tokens` tokens, the last token of `block`: where
        it lies, it is kept until the slot is needed.
        """
        if slot == NO_SLOT:
            return
        if block.state is not None:
            self._free.append(slot)
            return
        block.state = slot
        self._kept[block] = tokens

    # --- checkpoints ---

    def usable(self, match: Match) -> Match:
        """Of what is known of a prompt, as much as there is a state for."""
        if not self.active:
            return match
        partial = match.partial
        if partial is not None and partial.state is not None and len(partial.tokens or ()) == match.shared:
            return match
        for count in range(len(match.chain), 0, -1):
            if match.chain[count - 1].state is not None:
                return Match(match.chain[:count], None, 0)
        return NOTHING

    def keep(self, slot: int, block: Block, tokens: int) -> None:
        """Keep a copy of the state in `slot`, after `tokens` tokens of which the last is that of `block`."""
        if block.state is not None or not (self._spare or self._free or self._kept):
            return
        if not (self._spare or self._free):
            self.forget(next(iter(self._kept)))
        block.state = (self._spare or self._free).pop()
        self._kept[block] = tokens
        self._copies.append(StateCopy(slot, block.state, tokens))

    def forget(self, block: Block) -> None:
        """The checkpoint of a block, if there is one, is of no more use."""
        if block.state is not None:
            del self._kept[block]
            (self._free if block.state < self._working else self._spare).append(block.state)
            block.state = None

    def _make_way(self) -> int:
        """A slot to run in. If all are taken, the one unused for longest that no sequence runs in is given up
        and goes to the host, unless it is the oldest of all and there is no room.
        """
        if self._free:
            return self._free.pop()
        block = next(block for block in self._kept if (block.state or 0) < self._working)
        slot = block.state
        assert slot is not None
        oldest = next(iter(self._kept))
        if not self._spare:
            self.forget(oldest)
            if oldest is block:
                return self._free.pop()
        block.state = self._spare.pop()
        self._copies.append(StateCopy(slot, block.state, self._kept[block]))
        return slot

    def _touch(self, block: Block) -> None:
        self._kept[block] = self._kept.pop(block)

    def marks(self, tokens: Sequence[int], ends: Collection[int], after: int) -> list[int]:
        """Where, beyond `after` tokens, a prompt is worth a checkpoint: counts of tokens, whole blocks.

        That is at the end of its first message, which others are likely to begin with too, and of its last
        two, where its next turn will go on. The tokens in `ends` end a message, and so does the prompt's end.
        """
        if not (self._spare or self._free or self._kept):
            return []
        closing = set(ends)
        turns = [at + 1 for at, token in enumerate(tokens) if token in closing]
        wanted = {place // self._block * self._block for place in (*turns[:1], *turns[-2:], len(tokens) - 1)}
        marks: list[int] = []
        for mark in sorted(wanted):
            if mark - (marks[-1] if marks else after) >= self._apart:
                marks.append(mark)
        if not marks and not after:
            marks = [mark for mark in (max(wanted),) if mark]
        return marks

    def check(self, working: Collection[int], known: Collection[Block]) -> None:
        """Raises AssertionError unless the books agree with the slots of all running sequences and with all
        blocks that are known.
        """
        places = [block.state for block in self._kept]
        every = [*working, *self._free, *self._spare, *places]
        assert len(set(every)) == len(every), "a slot has two owners"
        assert len(every) == self._slots, "a slot is lost"
        assert {block for block in known if block.state is not None} == set(self._kept), "a state is lost"


def _path(match: Match) -> list[Block]:
    return match.chain if match.partial is None else [*match.chain, match.partial]
