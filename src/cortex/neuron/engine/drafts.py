"""Drafts how a sequence goes on from what it has said or been told: prompt lookup decoding (Saxena 2023).

Code that is edited and files that are quoted are said again word for word. So the tokens that followed the
last place which reads like the end of the sequence are computed along with its newest token, and count as far
as they are what would have been sampled anyway. Pure; knows neither the model nor what a step takes.
"""

from __future__ import annotations

from typing import Final

GRAM: Final = 3
"""Tokens that must read alike for what followed them to be worth a draft."""
MOST: Final = 7
FIRST: Final = 2
"""Tokens of a draft, at most and at first."""
MEMORY: Final = 0.25
"""Weight of the newest draft in what drafts are believed to gain."""
PAUSE, LONGEST_PAUSE = 8, 256
"""Tokens without a draft after drafts that lose, the first time and at most; twice as many each time."""
LOOKED_BACK: Final = 2**15
"""Tokens of a prompt that are looked through: the last ones."""
AT_ONCE: Final = 2**11
"""Tokens that are looked through for one step, which others wait for."""


class Drafter:
    """Of one sequence. Drafts become longer while they are right, and stop for a while where they cost more
    than they bring.
    """

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        """Where a sequence went on after these tokens, the last time."""
        self._indexed = 0
        self._length = FIRST
        self._gain = 0.0
        self._pause = PAUSE
        self._resumes = 0

    def rests(self, count: int) -> bool:
        """Whether nothing is drafted of a sequence of so many tokens, whatever they are."""
        return count < self._resumes or count <= GRAM

    def propose(self, tokens: list[int], most: int) -> list[int]:
        """The next tokens after `tokens`, `most` at most and often none. Tokens are only ever added."""
        count = len(tokens)
        if most < 1 or self.rests(count):
            return []
        after = self._after
        first = max(GRAM, self._indexed, count - LOOKED_BACK)
        self._indexed = min(count, first + AT_ONCE)
        for at in range(first, self._indexed):
            after[tuple(tokens[at - GRAM : at])] = at
        found = after.get(tuple(tokens[count - GRAM :]))
        if found is None:
            return []
        draft = tokens[found : found + min(most, self._length)]
        while len(draft) < min(most, self._length):  # it repeats what lies between that place and its end
            draft.append(draft[found - count])
        return draft

    def judge(self, drafted: int, accepted: int, price: float, count: int) -> None:
        """Of so many drafted tokens, each of which costs `price` tokens that could have been sampled
        meanwhile, the first `accepted` were right; the sequence has `count` tokens now.
        """
        self._gain += MEMORY * (accepted - price * drafted - self._gain)
        if accepted == drafted:
            self._length = min(MOST, 2 * self._length)
        else:
            self._length = max(1, accepted)
        if self._gain < 0:
            self._resumes = count + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            self._gain, self._length = 0.0, FIRST
        elif accepted == drafted:
            self._pause = PAUSE
