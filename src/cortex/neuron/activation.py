"""Loads the node's default models at start, one after the other, and tells how far that is.

One that is asked for before its turn is loaded at once, by the request that asks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from cortex.neuron.residents import Residents
from cortex.wire.errors import CortexError
from cortex.wire.node import Activation, LoadRequest

_log: Final = logging.getLogger("cortex.neuron.activation")


class Activator:
    """`state` is what /health shows of it."""

    def __init__(self, residents: Residents, model_ids: Sequence[str]) -> None:
        self._residents = residents
        residents.expect(model_ids)
        self.state = Activation(state="pre_warming" if model_ids else "ready", pending=list(model_ids))

    async def run(self) -> None:
        """Returns when each model has been tried, but those that were unloaded before their turn. One that
        fails is tried again when it is asked for.
        """
        while self.state.pending:
            model_id = self.state.pending.pop(0)
            report = self._residents.report(model_id)
            if report is not None and report.status == "unloaded":
                continue  # that is what somebody wanted meanwhile
            self.state.in_progress.append(model_id)
            try:
                await self._residents.ensure(LoadRequest(model_id=model_id))
                self.state.completed.append(model_id)
            except CortexError as error:
                _log.error("default model not loaded model=%s error=%s", model_id, error.message)
                self.state.failed.append({"model_id": model_id, "error": error.message})
            finally:
                self.state.in_progress.remove(model_id)
        self.state.state = "ready"
