"""Admission to one model: how many sequences run, how many may wait, how many one caller may have.

Counts only, in places: a request takes one for each sequence that it asks for. Who waits for whom, and for
how long, is decided by the engine's scheduler, which holds the sequences.
"""

from __future__ import annotations

from cortex.wire.errors import BadRequest, Busy, OverLimit


class Admission:
    """A bounded line in front of one model. `max_per_caller` 0 sets no bound for a single caller."""

    def __init__(self, *, max_running: int = 8, max_waiting: int = 32, max_per_caller: int = 0) -> None:
        self.max_running = max_running
        self.max_waiting = max_waiting
        self.max_per_caller = max_per_caller
        self._callers: dict[str, int] = {}
        """Places by caller; only of callers who have any, so that it stays small."""

    @property
    def present(self) -> int:
        """Places that are taken, running and waiting together."""
        return sum(self._callers.values())

    @property
    def running(self) -> int:
        return min(self.present, self.max_running)

    @property
    def waiting(self) -> int:
        return self.present - self.running

    def enter(self, model_id: str, caller: str = "", places: int = 1) -> None:
        """Take places; `leave` gives them back.

        Raises OverLimit if the caller has too many already, Busy if too few are free, and BadRequest if the
        request could never have so many.
        """
        self._check_size(model_id, places)
        mine = self._callers.get(caller, 0)
        if self.max_per_caller and mine + places > self.max_per_caller:
            raise OverLimit(
                f"You have {mine} requests in flight at {model_id}, and one caller may have "
                f"{self.max_per_caller} there. Try again when one of them has ended.",
                code="too_many_requests_in_flight",
                retry_after=self._pause(),
                details={"in_flight": mine, "max_per_caller": self.max_per_caller},
            )
        if self.present + places > self.max_running + self.max_waiting:
            raise Busy(
                f"{model_id} is busy: {self.running} running and {self.waiting} waiting requests leave too "
                f"few of its {self.max_running} + {self.max_waiting} places. Try again later.",
                retry_after=self._pause(),
                details={
                    "running": self.running,
                    "waiting": self.waiting,
                    "max_running": self.max_running,
                    "max_waiting": self.max_waiting,
                },
            )
        self._callers[caller] = mine + places

    def leave(self, caller: str = "", places: int = 1) -> None:
        left = self._callers.get(caller, 0) - places
        if left < 0:
            raise ValueError("nobody is here who could leave")
        if left:
            self._callers[caller] = left
        else:
            del self._callers[caller]

    def _check_size(self, model_id: str, places: int) -> None:
        most = self.max_running + self.max_waiting
        if self.max_per_caller:
            most = min(most, self.max_per_caller)
        if places > most:
            raise BadRequest(
                f"n must be at most {most} here: {model_id} takes no more sequences than that at a time.",
                param="n",
            )

    def _pause(self) -> float:
        """Seconds: two for each round of sequences that is in line."""
        return 2.0 * (1 + self.waiting // self.max_running)
