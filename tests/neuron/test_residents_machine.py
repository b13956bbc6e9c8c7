"""The residents under any order of events, against a factory whose loads end when the test says so."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from cortex.hookspecs import LoadedModel, LoadOrder, LoadPlan
from cortex.neuron.admission import Admission
from cortex.neuron.loading import Loader
from cortex.neuron.memory import Ledger
from cortex.neuron.resident import TRANSITIONS
from cortex.neuron.residents import Residents
from cortex.testing.clock import ManualClock, settle
from cortex.testing.scripted import ByteCodec, ScriptedEngine, ScriptedModel
from cortex.wire.errors import CortexError, LoadFailed
from cortex.wire.node import Limit, LoadRequest, Progress

MODELS = ("a", "b")
SIZES = {"a": 40, "b": 70}
BUDGET = 100
MIB = 2**20


class HeldFactory:
    """Loads, their clean-up and closing wait until the test ends them; knows what takes memory."""

    name = "held"

    def __init__(self) -> None:
        self.loads: dict[str, asyncio.Future[None]] = {}
        self.cleanups: dict[str, asyncio.Future[None]] = {}
        self.alive: dict[str, HeldModel] = {}

    @property
    def waits(self) -> dict[str, asyncio.Future[None]]:
        """What the test may end."""
        closing = {f"closing {name}": model.closing for name, model in self.alive.items() if model.closing}
        cleaning = {f"cleaning {name}": future for name, future in self.cleanups.items()}
        return {name: future for name, future in {**closing, **cleaning}.items() if not future.done()}

    def plan(self, order: LoadOrder) -> LoadPlan:
        return LoadPlan(order=order, bytes_per_device={"cpu": SIZES[order.model_id]}, limit=Limit())

    async def load(self, plan: LoadPlan, report: Callable[[Progress], None]) -> LoadedModel:
        model_id = plan.order.model_id
        assert model_id not in {**self.loads, **self.cleanups}, "two loads of one model"
        assert model_id not in self.alive, "loaded while it was loaded"
        self.loads[model_id] = asyncio.get_running_loop().create_future()
        try:
            report(Progress(phase="weights", done=1, total=2))
            await self.loads[model_id]
        except BaseException:
            cleanup = self.cleanups[model_id] = asyncio.get_running_loop().create_future()
            while not cleanup.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([cleanup])
            del self.cleanups[model_id]
            raise
        finally:
            del self.loads[model_id]
        model = self.alive[model_id] = HeldModel(self, plan)
        return model

    async def start(self) -> None: ...

    async def stop(self) -> None: ...


class HeldModel(ScriptedModel):
    def __init__(self, factory: HeldFactory, plan: LoadPlan) -> None:
        super().__init__(plan, ScriptedEngine(), ByteCodec())
        self.killed = False
        self.closing: asyncio.Future[None] | None = None
        self._factory = factory

    async def close(self) -> None:
        assert self.closing is None, "closed twice"
        self.closing = asyncio.get_running_loop().create_future()
        await self.closing
        await super().close()
        del self._factory.alive[self.plan.order.model_id]


async def at_once(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


async def locate(reference: str, report: object, quant: str | None) -> Path:
    return Path(reference)


class ResidentsMachine(RuleBasedStateMachine):
    """Rules are what clients, engines and time may do, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.clock = ManualClock()
        self.factory = HeldFactory()
        self.ledger = Ledger({"cpu": BUDGET})
        self.asked: list[asyncio.Task[Any]] = []
        self.answers: Counter[asyncio.Task[Any]] = Counter()
        self.surprises: list[BaseException | None] = []
        self.leases: list[tuple[str, asyncio.Event, asyncio.Task[None]]] = []
        self.held: dict[asyncio.Event, HeldModel] = {}
        self.waiting: dict[asyncio.Task[Any], str] = {}
        self.unloading: dict[asyncio.Task[Any], str] = {}
        self.ever_unloaded: set[str] = set()
        self.run(self.build())

    async def build(self) -> None:
        loader = Loader(
            factories={"held": self.factory},
            locate=locate,
            ledger=self.ledger,
            available=dict,
            devices=["cpu"],
            threads=2,
            off_loop=at_once,
        )
        self.residents = Residents(
            loader,
            defaults=[LoadRequest(model_id="a")],
            admission=lambda: Admission(max_running=1, max_waiting=1),
            clock=self.clock,
            wall=self.clock,
        )

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        async def all_of_it() -> Any:
            result = await work
            await settle(40)
            return result

        return self.loop.run_until_complete(all_of_it())

    def ask(self, work: Coroutine[Any, Any, Any]) -> None:
        async def start() -> None:
            task = asyncio.create_task(work)
            task.add_done_callback(self.note_answer)
            self.asked.append(task)

        self.run(start())

    def note_answer(self, task: asyncio.Task[Any]) -> None:
        self.answers[task] += 1
        error = None if task.cancelled() else task.exception()
        if error is None:
            return
        broken = not isinstance(error, CortexError) or "engine held failed" in error.message
        if broken or (error.code == "unloaded" and self.waiting[task] not in self.ever_unloaded):
            self.surprises.append(error)

    # --- clients ---

    @rule(model=st.sampled_from(MODELS), hold=st.sampled_from([None, 5.0]))
    def ensure(self, model: str, hold: float | None) -> None:
        self.ask(self.residents.ensure(LoadRequest(model_id=model, hold_s=hold)))
        self.waiting[self.asked[-1]] = model

    @rule(model=st.sampled_from(MODELS), if_idle=st.booleans())
    def unload(self, model: str, if_idle: bool) -> None:
        self.ever_unloaded.add(model)
        self.ask(self.residents.unload(model, if_idle=if_idle))
        self.unloading[self.asked[-1]] = model

    @rule(model=st.sampled_from(MODELS))
    def ensure_at_once(self, model: str) -> None:
        self.ensure(model, None)
        if model in self.factory.loads and not self.factory.loads[model].done():
            self.finish(model)

    @rule(model=st.sampled_from(MODELS))
    def lease(self, model: str) -> None:
        done = asyncio.Event()

        async def use() -> None:
            async with self.residents.lease(model, "request") as served:
                assert isinstance(served.model, HeldModel)
                self.held[done] = served.model
                try:
                    await done.wait()
                finally:
                    del self.held[done]

        self.ask(use())
        self.leases.append((model, done, self.asked[-1]))
        self.waiting[self.asked[-1]] = model

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """A client goes away while it waits for whatever it asked for."""
        waiting = [task for task in self.asked if not task.done()]
        if waiting:
            task = data.draw(st.sampled_from(waiting))
            task.cancel()
            self.run(settle())
            assert task.done()

    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        open_leases = [entry for entry in self.leases if not entry[1].is_set()]
        if open_leases:
            data.draw(st.sampled_from(open_leases))[1].set()
            self.run(settle())

    # --- engines and time ---

    @rule(data=st.data(), fails=st.booleans())
    def end_load(self, data: st.DataObject, fails: bool) -> None:
        pending = {name: load for name, load in self.factory.loads.items() if not load.done()}
        if pending:
            model = data.draw(st.sampled_from(sorted(pending)))
            if fails:
                pending[model].set_exception(LoadFailed("no luck"))
                self.run(settle())
            else:
                self.finish(model)

    def finish(self, model: str) -> None:
        self.factory.loads[model].set_result(None)
        self.run(settle())
        if model not in [name for task, name in self.unloading.items() if not task.done()]:
            report = self.residents.report(model)
            assert report is not None
            assert report.status == "loaded", "nobody asked for anything else"

    @rule(data=st.data())
    def end_wait(self, data: st.DataObject) -> None:
        if self.factory.waits:
            self.factory.waits[data.draw(st.sampled_from(sorted(self.factory.waits)))].set_result(None)
            self.run(settle())

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        if self.factory.alive:
            model = self.factory.alive[data.draw(st.sampled_from(sorted(self.factory.alive)))]
            model.killed = True
            model.engine.kill("was killed")
            self.run(settle())

    @rule(seconds=st.sampled_from([1.0, 6.0, 100.0]))
    def wait(self, seconds: float) -> None:
        self.run(self.clock.advance(seconds))

    # --- what always holds ---

    @invariant()
    def grants_are_exactly_of_what_loads_or_lives(self) -> None:
        granted = {grant.model_id for grant in self.ledger.grants}
        assert granted == set(self.factory.loads) | set(self.factory.alive)
        assert self.ledger.granted("cpu") <= BUDGET

    @invariant()
    def states_tell_the_truth(self) -> None:
        reports = {report.id: report for report in self.residents.reports()}
        assert "a" in reports, "a default model is always known"
        for model in MODELS:
            status = reports[model].status if model in reports else "unloaded"
            assert (status == "loading") == (model in self.factory.loads)
            alive = self.factory.alive.get(model)
            assert (status == "loaded") == (
                alive is not None and not alive.closing and not self.drains(model)
            )
            if model in reports:
                assert reports[model].servable.ok == (status == "loaded")

    def drains(self, model: str) -> bool:
        report = self.residents.report(model)
        return report is not None and report.status == "draining"

    @invariant()
    def a_load_is_wanted_by_somebody(self) -> None:
        wanted = {model for task, model in self.waiting.items() if not task.done()}
        assert set(self.factory.loads) - set(self.factory.cleanups) <= wanted

    @invariant()
    def nothing_is_closed_under_a_request(self) -> None:
        assert all(model.closing is None or model.killed for model in self.held.values())

    @invariant()
    def draining_is_refused_to_newcomers_and_ends(self) -> None:
        for model in MODELS:
            if self.drains(model) and self.factory.alive[model].closing is None:
                assert model in [held.plan.order.model_id for held in self.held.values()]

    @invariant()
    def failures_are_listed_with_their_reason(self) -> None:
        failed = {failure.id: failure for failure in self.residents.failed()}
        assert set(failed) == {report.id for report in self.residents.reports() if report.status == "failed"}
        assert all(failure.detail and 0 <= failure.retry_in_s <= 60 for failure in failed.values())

    @invariant()
    def in_flight_is_who_is_there(self) -> None:
        for load in self.residents.loads():
            mine = [task for model, _, task in self.leases if model == load.id and not task.done()]
            assert load.in_flight + load.queue_depth == len(mine)

    @invariant()
    def everybody_gets_one_answer(self) -> None:
        for task in self.asked:
            assert self.answers[task] == int(task.done())
        assert not self.surprises

    def teardown(self) -> None:
        for _, done, _ in self.leases:
            done.set()
        self.run(self.stop())
        assert all(task.done() for task in self.asked), "nobody is left waiting"
        assert not self.ledger.grants
        assert not self.factory.alive
        assert not self.factory.loads
        assert not self.residents.requests()
        self.loop.close()

    async def stop(self) -> None:
        stopping = asyncio.create_task(self.residents.stop())
        await settle(40)
        while self.factory.waits:
            for future in self.factory.waits.values():
                future.set_result(None)
            await settle(40)
        await stopping


TestResidents = pytest.mark.slow(ResidentsMachine.TestCase)
TestResidents.settings = settings(max_examples=200, stateful_step_count=60)


def test_every_status_can_be_left() -> None:
    assert all(TRANSITIONS[status] for status in TRANSITIONS)
    assert {target for targets in TRANSITIONS.values() for target in targets} == set(TRANSITIONS)
