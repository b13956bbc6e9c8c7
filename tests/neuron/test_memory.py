from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cortex.neuron.memory import Ledger, budget_of
from cortex.wire.errors import BadRequest, Conflict

MODELS = st.sampled_from(["a", "b", "c", "d"])
BUDGETS = {"cpu": 100, "gpu": 40}
ASKS = st.dictionaries(st.sampled_from(list(BUDGETS)), st.integers(0, 120), min_size=1)


class LedgerMachine(RuleBasedStateMachine):
    """Grants and releases in any order, against a plain dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(BUDGETS)
        self.held: dict[str, dict[str, int]] = {}

    @rule(model=MODELS, asked=ASKS)
    def grant(self, model: str, asked: dict[str, int]) -> None:
        if model in self.held:
            with pytest.raises(ValueError, match="holds a grant"):
                self.ledger.grant(model, asked)
            return
        fits = all(
            size + sum(held.get(device, 0) for held in self.held.values()) <= BUDGETS[device]
            for device, size in asked.items()
        )
        if fits:
            self.ledger.grant(model, asked)
            self.held[model] = asked
        else:
            with pytest.raises(Conflict):
                self.ledger.grant(model, asked)

    @rule(model=MODELS)
    def release(self, model: str) -> None:
        before = {device: self.ledger.free(device) for device in BUDGETS}
        given = self.held.pop(model, {})
        self.ledger.release(model)
        for device, free in before.items():
            assert self.ledger.free(device) == free + given.get(device, 0)

    @invariant()
    def never_over_the_budget(self) -> None:
        for device, budget in BUDGETS.items():
            promised = sum(grant.bytes for grant in self.ledger.grants if grant.device == device)
            assert promised == self.ledger.granted(device) == budget - self.ledger.free(device) <= budget


TestLedger = LedgerMachine.TestCase


def test_a_refusal_shows_the_ledger() -> None:
    ledger = Ledger({"cpu": 1000})
    ledger.grant("first", {"cpu": 600})
    with pytest.raises(Conflict, match="No room for second on cpu") as refusal:
        ledger.grant("second", {"cpu": 500})
    assert refusal.value.code == "no_room"
    assert refusal.value.details["ledger"] == [
        {
            "device": "cpu",
            "budget_bytes": 1000,
            "granted_bytes": 600,
            "free_bytes": 400,
            "asked_bytes": 500,
            "granted": [{"model_id": "first", "bytes": 600}],
        }
    ]


def test_memory_that_other_programs_hold_is_not_promised() -> None:
    ledger = Ledger({"cpu": 1000})
    with pytest.raises(Conflict, match="free of other programs") as refusal:
        ledger.grant("model", {"cpu": 500}, available={"cpu": 300})
    assert refusal.value.details["ledger"][0]["available_bytes"] == 300
    ledger.grant("model", {"cpu": 300}, available={"cpu": 300})


def test_an_unknown_device_is_refused_by_name() -> None:
    with pytest.raises(BadRequest, match="no device 'gpu-9'; it has cpu"):
        Ledger({"cpu": 10}).grant("m", {"gpu-9": 1})


def test_a_negative_grant_cannot_make_room() -> None:
    with pytest.raises(ValueError, match="negative"):
        Ledger({"cpu": 10}).grant("m", {"cpu": -5})


@pytest.mark.parametrize(
    ("total", "floor", "share", "budget"), [(1000, 100, 1.0, 900), (1000, 100, 0.5, 400), (100, 300, 1.0, 0)]
)
def test_the_budget_is_a_share_less_the_floor(total: int, floor: int, share: float, budget: int) -> None:
    assert budget_of(total, floor=floor, share=share) == budget
