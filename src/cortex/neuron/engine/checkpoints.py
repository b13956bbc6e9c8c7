"""Accounts for the states of recurrent layers: the slot of each running sequence, and what is kept of them.

A checkpoint is a copy of a sequence's state after the last token of a block. It stands at the block, so that
the prefix cache finds both together, and goes when the block goes, or when room is needed, the one unused for
longest first. Knows no tensors: copies are listed, and somebody else makes them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

from cortex.neuron.engine.blocks import NOTHING, Block, Match
from cortex.neuron.nn.plan import NO_SLOT, Copy

APART: Final = 64
"""Tokens. What lies closer together is computed sooner than two states are copied."""


class StateBooks:
    """`working` slots for running sequences, and after them `kept` places for checkpoints. A model without
    recurrent layers has none, and everything here then does nothing.

    `block` is the size of blocks in tokens, `apart` how many tokens there are at least between two marks.
    """

    def __init__(self, working: int = 0, kept: int = 0, *, block: int = 1, apart: int = APART) -> None:
        self.active: Final = working > 0
        self._block = block
        self._apart = apart
        self._free = list(reversed(range(working)))
        self._spare = list(reversed(range(working, working + kept)))
        self._kept: dict[Block, None] = {}
        """Blocks with a checkpoint, the longest unused first."""
        self._copies: list[Copy] = []

    @property
    def kept(self) -> int:
        return len(self._kept)

    def take_copies(self) -> list[Copy]:
        """What is to be copied before anything else is computed, in this order: one slot to another."""
        copies, self._copies = self._copies, []
        return copies

    # --- a sequence's slot ---

    def begin(self, match: Match) -> int:
        """A slot for a sequence of which `match`, as `usable` gave it, is known already."""
        if not self.active:
            return NO_SLOT
        slot = self._free.pop()
        known = {block: block.state for block in _path(match) if block.state is not None}
        blocks = [*known]
        if blocks:
            self._copies.append(Copy(known[blocks[-1]], slot, 1))
        for block in reversed(blocks[:1] + blocks[-1:]):  # the system prompt's goes last of all
            self._kept[block] = self._kept.pop(block)
        return slot

    def end(self, slot: int) -> None:
        """The sequence needs its state no more."""
        if slot != NO_SLOT:
            self._free.append(slot)

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

    def keep(self, slot: int, block: Block) -> None:
        """Keep the state in `slot` as the one after the last token of `block`."""
        if block.state is not None or not (self._spare or self._kept):
            return
        if not self._spare:
            self.forget(next(iter(self._kept)))
        block.state = self._spare.pop()
        self._kept[block] = None
        self._copies.append(Copy(slot, block.state, 1))

    def forget(self, block: Block) -> None:
        """The checkpoint of a block, if there is one, is of no more use."""
        if block.state is not None:
            del self._kept[block]
            self._spare.append(block.state)
            block.state = None

    def marks(self, tokens: Sequence[int], ends: Collection[int], after: int) -> list[int]:
        """Where, beyond `after` tokens, a prompt is worth a checkpoint: counts of tokens, whole blocks.

        That is at the end of its first message, which others are likely to begin with too, and of its last
        two, where its next turn will go on. The tokens in `ends` end a message, and so does the prompt's end.
        """
        if not (self._spare or self._kept):
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
        assert len({*working, *self._free}) == len(working) + len(self._free), "a slot has two owners"
        assert len({*places, *self._spare}) == len(places) + len(self._spare), "a place is kept twice"
        assert {block for block in known if block.state is not None} == set(self._kept), "a state is lost"


def _path(match: Match) -> list[Block]:
    return match.chain if match.partial is None else [*match.chain, match.partial]
