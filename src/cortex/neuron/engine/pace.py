"""How much of prompts a step may take on, so that those who decode beside them hardly notice.

Aims at a time: a step with prefill in it may take so many times what one takes in which a full batch decodes.
What prefill costs is learned from the steps that were made. Knows no sequences.
"""

from __future__ import annotations

import math
from typing import Final

STRETCH: Final = 2.0
"""What a step with prefill in it may take, in steps in which a full batch decodes."""
LEAST: Final = 0.5
"""What prefill gets at least, in passes of those who decode now: they may have become slower than usual."""
MEMORY: Final = 0.3
"""Weight of the newest step in what is believed of prefill."""
JUMP: Final = 2.0
"""A step counts as at most so many times what is believed of prefill, and as no less than that part of it."""
MEMORY_OF_DECODE: Final = 0.1
JUMP_OF_DECODE: Final = 1.25
"""The same of decode, whose steps are many: what they usually take is close to their median then, and those
that somebody else disturbed make it no longer."""
UNPROVEN: Final = 4
"""So many steps of a number that decode, the first ones, count as their quickest: the very first may have
waited for kernels and memory, and it would be believed as long as fewer decode."""
FIRST: Final = 128
"""Tokens of a chunk of a long prompt, as long as nothing is known of what they cost."""
DOUBT: Final = 0.95
"""What is believed of prompts beside others becomes so much less with each one that is kept from it: it was
learned from few steps, and if those were slow, nothing else would ever put it right."""
FEW: Final = 3.0
"""Attention of a few tokens to their context takes each of them so many times what it takes one of many."""
ROUND: Final = 32
"""Chunks of long prompts have a multiple of so many tokens: kernels are made anew for each length."""
DRAFTED: Final = 0.15
"""What a drafted token is believed to cost at first, in tokens that could have been sampled instead: weights
are read once for a step, those of experts more often."""
CHEAP, DEAR = 0.01, 4.0
"""A drafted token is not believed to cost less, or more."""
ALMOST: Final = 0.7
"""A layer is passed if this part of the time that it takes is left: what is believed of it is not exact,
and one too few slows the prompt as much as one too many slows the others."""


class Pace:
    """For a model of `layers` layers, of which a step takes at most `most` tokens of prompts at once.

    Beside those who decode, prompts that are short enough share their pass. A long one has a pass of its own,
    a chunk at a time, and goes through some layers of it between theirs (layered prefill, arXiv 2510.08055):
    a chunk that is large enough to be computed well costs more time than others may be kept waiting.

    Prefill is counted in work: 1 is a token without a context, 2 one with a context of `even` tokens, as
    attention to them costs as much as all else.
    """

    def __init__(self, most: int, layers: int, even: float) -> None:
        self.most: Final = most
        self.layers: Final = layers
        self._even = even
        self._alone: dict[int, float] = {}
        """Seconds of a step that only decodes, by the number of its sequences."""
        self._steps: dict[int, int] = {}
        """Of how many steps that is known, up to UNPROVEN."""
        self._decode: dict[int, float] = {}
        """The same, also where a chunk passes some layers between their passes and leaves caches cold."""
        self._beside: float | None = None
        """Seconds that work takes in the pass of those who decode."""
        self._apart: float | None = None
        """Seconds that work takes in a layer of a pass of its own."""
        self._drafted: dict[int, float] = {}
        """What a drafted token costs, see `draft_price`, by how many decode."""

    def work(self, tokens: int, context: int) -> float:
        """Of a chunk of the tokens that follow `context` others."""
        return tokens * (1 + (context + tokens / 2) / self._even)

    def work_beside(self, tokens: int, context: int) -> float:
        """The same of a few in the pass of those who decode."""
        return tokens * (1 + FEW * (context + tokens / 2) / self._even)

    def knows(self, decoding: int) -> bool:
        """Whether it is known what so many that decode take; if not, a step of them alone comes first."""
        return decoding in self._alone

    def spare(self, decoding: int) -> float:
        """Seconds that prefill may take for each pass of so many that decode."""
        return self.left(decoding, self._usual(decoding)) if self._alone else 0.0

    def left(self, decoding: int, seconds: float) -> float:
        """The same where that pass, and what was beside them in it, has taken `seconds`."""
        if not self._alone:
            return 0.0
        return max(LEAST * self._usual(decoding), STRETCH * self._alone[self._full()] - seconds)

    def _full(self) -> int:
        """How many decode in a full batch: the most of which some steps were seen, so that one slow step of
        more is not what all turns go by.
        """
        return max([number for number, steps in self._steps.items() if steps >= UNPROVEN] or self._alone)

    def _usual(self, decoding: int) -> float:
        return self._decode.get(decoding, max(self._decode.values()))

    def beside(self, work: float) -> float | None:
        """Seconds of so much work in the pass of those who decode; None if that is not known at all."""
        if self._beside is not None:
            return work * self._beside
        return None if self._apart is None else work * self._apart * self.layers

    def doubt(self, piece: int) -> None:
        """A prompt of so many tokens alone is believed to be too dear for the pass of those who decode."""
        seconds = self.beside(1.0)
        if piece <= ROUND and seconds is not None:
            self._beside = DOUBT * seconds

    def chunk(self, seconds: float, piece: int, context: int) -> int:
        """Tokens of the next chunk of a long prompt, of which `piece` may be computed at once after `context`
        tokens, where prefill gets so many seconds in a step: as many as pass one layer in that time, more
        layers where that is more than a step takes. Large chunks are computed best. They are alike: a few
        tokens that are left over would cost as much as many.
        """
        most = FIRST
        if self._apart is not None:
            heavy = self._apart * self.work(1, context + self.most // 2)
            tokens = seconds / heavy
            layers = max(1, math.ceil(tokens / self.most))
            most = max(ROUND, ROUND * round(tokens / layers / ROUND))
        most = min(most, self.most)
        return min(piece, most, _rounded(piece / math.ceil(piece / most)))

    def passes(self, seconds: float, work: float) -> int:
        """How many layers so much work passes in about so many seconds; none if that is not known."""
        if self._apart is None:
            return 0
        return max(0, math.floor(seconds / (work * self._apart) + 1 - ALMOST))

    def made(self, decoding: int, beside: float, seconds: float, *, alone: bool = True) -> None:
        """A pass took `seconds` in which so many decoded, with so much work beside them. `alone`: there are
        no passes of a long prompt between theirs.
        """
        if not decoding:
            self.passed(beside, self.layers, seconds)
        elif not beside:
            _decoded(self._decode, decoding, seconds)
            if alone:
                self._decoded_alone(decoding, seconds)
        elif decoding in self._decode:
            self._beside = _moved(self.beside(1.0), seconds - self._decode[decoding], beside)

    def _decoded_alone(self, decoding: int, seconds: float) -> None:
        steps = self._steps.get(decoding, 0)
        if steps < UNPROVEN:
            self._steps[decoding] = steps + 1
            self._alone[decoding] = min(seconds, self._alone.get(decoding, seconds))
        else:
            _decoded(self._alone, decoding, seconds)

    def draft_price(self, decoding: int) -> float:
        """Of each drafted token in a pass of so many that decode: how many tokens these could have had in the
        time that it takes. If more than one, even a right draft loses.
        """
        return self._drafted.get(decoding, DRAFTED)

    def longest_draft(self, decoding: int) -> int:
        """Tokens of a draft that, if it is wrong, costs as much as one of the tokens that so many could have
        had meanwhile; at least 1, from which to learn what it costs.
        """
        return max(1, int(1 / max(self.draft_price(decoding), CHEAP)))

    def drafted(self, decoding: int, tokens: int, seconds: float) -> None:
        """A pass of so many that decode took `seconds` with so many drafted tokens. Without them it would
        have taken less, so what is believed of that is no more: the first pass may have been a slow one.
        """
        for known in (self._alone, self._decode):
            near = _near(seconds, known[decoding], JUMP_OF_DECODE)
            known[decoding] = min(known[decoding], near)
        usual = self._decode[decoding]
        found = decoding * max(0.0, seconds / usual - 1) / tokens if usual else 0.0
        price = self.draft_price(decoding)
        self._drafted[decoding] = price + MEMORY * (min(found, DEAR) - price)

    def passed(self, work: float, layers: int, seconds: float) -> None:
        """So much work went through so many layers in a pass of its own."""
        self._apart = _moved(self._apart, seconds, work * layers)


def _rounded(tokens: float) -> int:
    return math.ceil(tokens / ROUND) * ROUND


def _decoded(known: dict[int, float], count: int, seconds: float) -> None:
    """What is believed of a pass of so many that decode, after one that took `seconds`."""
    before = known.get(count, seconds)
    known[count] = before + MEMORY_OF_DECODE * (_near(seconds, before, JUMP_OF_DECODE) - before)


def _moved(known: float | None, seconds: float, work: float) -> float | None:
    """What is believed of the cost of work, after so much of it took `seconds`."""
    found = max(0.0, seconds) / work
    if known is None:
        return found or None
    return known + MEMORY * (_near(found, known, JUMP) - known)


def _near(found: float, known: float, times: float) -> float:
    return max(known / times, min(known * times, found))
