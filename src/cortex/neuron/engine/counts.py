"""What the scheduler counts between two reports of a step, for the node's metrics. Knows nothing of steps."""

from __future__ import annotations


class Counts:
    """All in tokens but for `preempted`, which are sequences."""

    def __init__(self) -> None:
        self.queried = self.hit = self.preempted = 0
        """Prompt tokens that were looked up and found; how often a sequence had to give way."""
        self.drafted = self.accepted = 0
        """Of drafts, and those of them that were what was sampled."""
        self.wasted = 0
        """Sampled of sequences that had ended when that was read."""
