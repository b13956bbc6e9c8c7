"""Admission to one model: how many requests run, how many may wait, and the refusal when neither fits.

Counts only. Who waits for whom is decided by the engine's scheduler, which holds the sequences.
"""

from __future__ import annotations

from cortex.wire.errors import MAX_RETRY_AFTER, Busy


class Admission:
    """A bounded line in front of one model."""

    def __init__(self, *, max_running: int = 1, max_waiting: int = 8) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self._present = 0

    @property
    def running(self) -> int:
        return min(self._present, self.max_running)

    @property
    def waiting(self) -> int:
        return self._present - self.running

    def enter(self, model_id: str) -> None:
        """Take a place; `leave` gives it back. Raises Busy if all places are taken."""
        if self._present >= self.max_running + self.max_waiting:
            raise Busy(
                f"{model_id} is busy: {self.running} running and {self.waiting} waiting requests fill "
                f"all of its {self.max_running} + {self.max_waiting} places. Try again later.",
                retry_after=min(MAX_RETRY_AFTER, 2 * (self.waiting + 1)),
                details={
                    "running": self.running,
                    "waiting": self.waiting,
                    "max_running": self.max_running,
                    "max_waiting": self.max_waiting,
                },
            )
        self._present += 1

    def leave(self) -> None:
        if self._present == 0:
            raise ValueError("nobody is here who could leave")
        self._present -= 1
