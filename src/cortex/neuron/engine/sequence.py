"""One sequence in the engine: its tokens, how far it is, its blocks, its chance and its times.

The scheduler owns it. Knows no torch and no other sequence.
"""

from __future__ import annotations

import random
from array import array
from typing import Literal, NamedTuple

from cortex.hookspecs import EngineTimings, Sampling, TokenLogprobs
from cortex.neuron.engine.blocks import Block
from cortex.neuron.engine.drafts import Drafter
from cortex.neuron.engine.messages import Generate
from cortex.neuron.nn.plan import NO_SLOT, Run


class Tally:
    """The distinct tokens of a sequence, and how often its reply holds each; what penalties go by."""

    def __init__(self, prompt: list[int]) -> None:
        distinct = dict.fromkeys(prompt)
        self.ids = array("q", distinct)
        self.counts = array("f", bytes(4 * len(distinct)))
        self._index = {token: index for index, token in enumerate(distinct)}

    def add(self, token: int) -> None:
        index = self._index.setdefault(token, len(self.ids))
        if index == len(self.ids):
            self.ids.append(token)
            self.counts.append(0.0)
        self.counts[index] += 1.0


Sampled = tuple[int, TokenLogprobs | None]
"""A token and what was asked about it."""


class Said(NamedTuple):
    """What a step has added to a reply. `accepted` of the ids were drafted before they were sampled."""

    ids: list[int]
    logprobs: list[TokenLogprobs]
    finish: Literal["stop", "length"] | None
    accepted: int


class Sequence:
    """Prefill and decode are one thing: the tokens that the cache lacks are computed next.

    Times are seconds of the scheduler's clock.
    """

    def __init__(self, order: Generate, arrived: float) -> None:
        self.key = order.key
        self.request_id = order.request_id
        self.sampling: Sampling = order.sampling
        self.tokens = list(order.ids)
        self.blocks: list[Block] = []
        self.known = 0
        """How many of the blocks are in the tree of known blocks."""
        self.cached = 0
        """Tokens whose keys and values the cache holds."""
        self.promised = 0
        """Blocks that are set aside for it beside those that it has."""
        self.reserved = 0
        """Blocks that it was sure of when it started."""
        self.hit: int | None = None
        """Prompt tokens that the prefix cache had, until an output has told it."""
        self.slot = NO_SLOT
        """Where its state is, while it runs."""
        self.stride: int | None = None
        """No step computes tokens on both sides of a multiple of this."""
        self.marks: list[int] = []
        """Counts of tokens, beyond those that are cached, after which its state is to be kept."""
        self.arrived = arrived
        self.prompt_length = len(order.ids)
        self.tally = Tally(self.tokens) if order.sampling.penalises else None
        self.draft: list[int] = []
        """Tokens that the step computes after the newest one, in case they are what is sampled."""
        self.drafter = Drafter()
        self._chance = random.Random(order.sampling.seed)
        self._drawn: list[int] = []
        self._started: float | None = None
        self._first_token: float | None = None
        self._runs: list[Run] = []

    @property
    def missing(self) -> int:
        """Tokens to compute before the next one can be sampled; 1 in decode."""
        return len(self.tokens) - self.cached

    @property
    def piece(self) -> int:
        """Of the missing tokens, those that may be computed at once."""
        most = self._within_stretch(self.missing)
        return min(most, self.marks[0] - self.cached) if self.marks else most

    def _within_stretch(self, tokens: int) -> int:
        """Of so many tokens from the first missing one on, those that one step may compute."""
        return tokens if self.stride is None else min(tokens, self.stride - self.cached % self.stride)

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def in_decode(self) -> bool:
        """All that is missing is the token that was sampled last."""
        return self.generated > 0 and self.missing == 1

    @property
    def has_started(self) -> bool:
        return self._started is not None

    def begins_like(self, other: Sequence, least: int) -> int:
        """How many tokens both begin with, at most all but the last of either; 0 if fewer than `least`."""
        most = min(len(self.tokens), len(other.tokens)) - 1
        if least > most or self.tokens[:least] != other.tokens[:least]:
            return 0
        pairs = zip(self.tokens[least:most], other.tokens[least:most], strict=True)
        return next((at for at, (mine, its) in enumerate(pairs, least) if mine != its), most)

    def is_full(self, context: int, ahead: int = 0) -> bool:
        """Whether it ends by its length once it has so many tokens more, in a context of so many."""
        full = len(self.tokens) + ahead >= context
        return full or self.generated + ahead >= self.sampling.max_tokens

    def needs(self, context: int, spare: int) -> int:
        """Tokens that there must be room for before it starts. One that has outgrown its reserve and was
        preempted needs some of its own again, `spare`.
        """
        reply = self.sampling.max_tokens
        if self.sampling.reserve is not None:
            reply = min(reply, self.sampling.reserve)
        return min(max(self.prompt_length + reply, len(self.tokens) + spare), context)

    def runs(self, size: int) -> list[Run]:
        """Where the cache has the sequence, in blocks of `size` rows that lie one after the other joined."""
        if not self._runs:
            for block in self.blocks:
                first = block.place * size
                if self._runs and sum(self._runs[-1]) == first:
                    self._runs[-1] = (self._runs[-1][0], self._runs[-1][1] + size)
                else:
                    self._runs.append((first, size))
        return self._runs

    def blocks_changed(self) -> None:
        self._runs = []

    def draw(self, ahead: int) -> int:
        """The number of 64 bits for the token that is to come after `ahead` others: from the sequence's own
        seed, whatever its batch mates do.
        """
        while len(self._drawn) <= ahead:
            self._drawn.append(self._chance.getrandbits(64))
        return self._drawn[ahead]

    def start(self, now: float) -> None:
        """A step with this sequence begins; the first one ends its wait."""
        if self._started is None:
            self._started = now

    def make_draft(self, fit: int, most: int) -> None:
        """Of how it may go on, of `most` tokens, where `fit` do in all. With penalties there is none, as each
        token changes what the next one is sampled from.
        """
        if self.tally is None:
            room = min(most, fit - len(self.tokens), self.sampling.max_tokens - self.generated - 1)
            room = self._within_stretch(self.missing + room) - self.missing
            self.draft = self.drafter.propose(self.tokens, room)

    def take(self, rows: list[Sampled], context: int, now: float) -> Said:
        """What was sampled after the newest token and, as long as that is what was drafted, after each token
        of the draft: what is cached from a wrong one on is never read. It may have `context` tokens.
        """
        draft, self.draft = self.draft, []
        said = Said([], [], None, 0)
        for ahead, (token, logprobs) in enumerate(rows):
            if token in self.sampling.stop_ids:
                self.mark_sampled(now)
                said = said._replace(finish="stop")
                break
            self.append(token, now)
            said.ids.append(token)
            if logprobs is not None:
                said.logprobs.append(logprobs)
            if self.is_full(context):
                said = said._replace(finish="length")
                break
            if ahead == len(draft) or token != draft[ahead]:
                break
            said = said._replace(accepted=ahead + 1)
        self.cached += said.accepted
        return said

    def append(self, token: int, now: float) -> None:
        self.tokens.append(token)
        if self._drawn:
            self._drawn.pop(0)
        if self.tally is not None:
            self.tally.add(token)
        self.mark_sampled(now)

    def mark_sampled(self, now: float) -> None:
        """A token was sampled; the first one ends prefill."""
        if self._first_token is None:
            self._first_token = now

    def timings(self, now: float) -> EngineTimings:
        started = now if self._started is None else self._started
        first = now if self._first_token is None else self._first_token
        return EngineTimings(
            queue_ms=(started - self.arrived) * 1e3,
            prefill_ms=(first - started) * 1e3,
            decode_ms=(now - first) * 1e3,
        )


def fault(order: Generate, context: int, vocab: int) -> str | None:
    """Why a sequence cannot be run with so many tokens of context and in the vocabulary, if it cannot."""
    if not order.ids:
        return "The prompt is empty; at least one token is needed."
    if len(order.ids) >= context:
        return f"The prompt has {len(order.ids)} tokens; the context of {context} leaves no room."
    if min(order.ids) < 0 or max(order.ids) >= vocab:
        return f"The prompt holds ids outside the model's {vocab} tokens."
    if order.sampling.max_tokens < 1:
        return f"max_tokens is {order.sampling.max_tokens}; at least 1 is needed."
    return None
