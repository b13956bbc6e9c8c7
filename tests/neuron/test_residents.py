from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from cortex.hookspecs import EngineStep, LoadOrder, LoadPlan
from cortex.neuron.activation import Activator
from cortex.neuron.admission import Admission
from cortex.neuron.loading import Loader
from cortex.neuron.memory import Ledger
from cortex.neuron.residents import Residents
from cortex.testing.clock import ManualClock, settle
from cortex.testing.scripted import ScriptedEngine, ScriptedFactory, ScriptedModel
from cortex.wire.errors import (
    BadRequest,
    Busy,
    Conflict,
    CortexError,
    LoadFailed,
    NoCapacity,
    OverLimit,
    UnknownModel,
)
from cortex.wire.node import LoadRequest, Progress

MIB = 2**20


async def at_once(function: Callable[..., Any], /, *arguments: Any) -> Any:
    """In place of a thread, for which nobody could wait who lets tasks settle."""
    return function(*arguments)


class Node:
    """Residents over scripted engines, with a gate in the middle of every load."""

    def __init__(self, *, budget_mb: int = 100, defaults: tuple[str, ...] = (), **admission: int) -> None:
        self.clock = ManualClock()
        self.engines: dict[str, ScriptedEngine] = {}
        self.factory = ScriptedFactory(self.make_engine)
        self.gate = asyncio.Event()
        self.gate.set()
        self.factory.before_load = lambda plan: self.gate.wait()
        self.located: list[str] = []
        self.steps: list[tuple[str, EngineStep]] = []
        self.missing: set[str] = set()
        self.ledger = Ledger({"cpu": budget_mb * MIB})
        self.loader = Loader(
            factories={"scripted": self.factory},
            locate=self.locate,
            ledger=self.ledger,
            available=dict,
            devices=["cpu"],
            threads=4,
            off_loop=at_once,
        )
        self.residents = Residents(
            self.loader,
            defaults=[LoadRequest(model_id=model_id, source=f"of {model_id}") for model_id in defaults],
            admission=lambda: Admission(**admission),
            on_step=lambda model_id, step: self.steps.append((model_id, step)),
            clock=self.clock,
            wall=lambda: self.clock.now + 1e9,
        )

    def make_engine(self, order: LoadOrder) -> ScriptedEngine:
        engine = self.engines[order.model_id] = ScriptedEngine()
        return engine

    async def locate(self, reference: str, report: object, quant: str | None) -> Path:
        self.located.append(reference)
        if reference in self.missing:
            raise UnknownModel(f"There is no model {reference!r}.")
        return Path(reference)

    def status(self, model_id: str) -> str | None:
        report = self.residents.report(model_id)
        return report.status if report else None

    async def loading(self, count: int = 1) -> None:
        while len(self.factory.loading) < count:
            await asyncio.sleep(0)

    async def die(self, model_id: str) -> None:
        self.engines[model_id].kill("was killed by SIGKILL")
        await settle()


@pytest.fixture
async def node() -> AsyncIterator[Node]:
    node = Node()
    yield node
    node.gate.set()
    await node.residents.stop()
    assert not node.ledger.grants
    assert not node.factory.live


def request(model_id: str = "m", **more: object) -> LoadRequest:
    return LoadRequest(model_id=model_id, **more)  # type: ignore[arg-type]


async def test_concurrent_requests_join_one_load(node: Node) -> None:
    node.gate.clear()
    seen: list[list[Progress]] = [[], [], []]
    first = asyncio.create_task(node.residents.ensure(request(), seen[0].append))
    await node.loading()
    others = [asyncio.create_task(node.residents.ensure(request(), each.append)) for each in seen[1:]]
    await settle()
    assert node.status("m") == "loading"
    node.gate.set()
    reports = [await task for task in (first, *others)]
    assert [report.status for report in reports] == ["loaded"] * 3
    assert len(node.factory.models) == 1
    assert seen[0] == seen[1] == seen[2] != []


async def test_loaded_is_success(node: Node) -> None:
    await node.residents.ensure(request())
    report = await node.residents.ensure(request())
    assert report.status == "loaded"
    assert (report.harness, report.bytes_per_device) == ("scripted", {"cpu": 64 * MIB})
    assert len(node.factory.models) == 1


async def test_a_load_that_nobody_waits_for_is_cancelled(node: Node) -> None:
    node.gate.clear()
    task = asyncio.create_task(node.residents.ensure(request()))
    await node.loading()
    task.cancel()
    await settle()
    assert node.factory.cancelled_loads == ["m"]
    assert node.status("m") is None
    assert not node.ledger.grants


async def test_other_waiters_are_unharmed_by_one_that_leaves(node: Node) -> None:
    node.gate.clear()
    leaver, stayer = (asyncio.create_task(node.residents.ensure(request())) for _ in range(2))
    await node.loading()
    leaver.cancel()
    await settle()
    assert node.factory.cancelled_loads == []
    node.gate.set()
    assert (await stayer).status == "loaded"


async def test_a_newcomer_does_not_join_a_load_that_is_being_cancelled(node: Node) -> None:
    node.gate.clear()
    leaver = asyncio.create_task(node.residents.ensure(request()))
    await node.loading()
    leaver.cancel()
    await asyncio.sleep(0)
    newcomer = asyncio.create_task(node.residents.ensure(request()))
    await settle()
    node.gate.set()
    assert (await newcomer).status == "loaded"
    assert node.factory.cancelled_loads == ["m"]


async def test_default_models_wait_for_themselves(node: Node) -> None:
    node = Node(defaults=("a", "b"))
    node.gate.clear()
    activator = Activator(node.residents, ["a", "b"])
    running = asyncio.create_task(activator.run())
    await node.loading()
    visitor = asyncio.create_task(node.residents.ensure(request("a")))
    await settle()
    visitor.cancel()
    await settle()
    assert (activator.state.state, activator.state.in_progress) == ("pre_warming", ["a"])
    assert node.status("b") == "loading", "as far as others are concerned"
    node.gate.set()
    node.ledger.grant("in the way", {"cpu": 30 * MIB})
    await running
    assert activator.state.state == "ready"
    assert activator.state.completed == ["a"]
    assert [failure["model_id"] for failure in activator.state.failed] == ["b"]
    report = node.residents.report("b")
    assert report is not None
    assert (report.status, report.servable.ok) == ("failed", False)
    assert "No room for b" in (report.servable.detail or "")
    await node.residents.stop()


async def test_a_request_for_a_default_model_does_not_wait_for_its_turn() -> None:
    node = Node(defaults=("a", "b"), budget_mb=200)
    node.gate.clear()
    running = asyncio.create_task(Activator(node.residents, ["a", "b"]).run())
    await node.loading()

    async def use(model_id: str) -> None:
        async with node.residents.lease(model_id, "r"):
            pass

    left = asyncio.create_task(use("b"))
    await node.loading(2)
    assert node.factory.loading == ["a", "b"]
    left.cancel()
    await settle()
    assert node.factory.cancelled_loads == ["b"]
    asked = asyncio.create_task(use("b"))  # its turn is still to come
    await settle()
    node.gate.set()
    await asked
    await running
    assert [node.status(model_id) for model_id in ("a", "b")] == ["loaded", "loaded"]
    await node.residents.unload("b")
    with pytest.raises(UnknownModel, match="loaded: a; can be loaded: b"):
        await use("b")
    await node.residents.stop()


async def test_a_default_model_that_is_unloaded_before_its_turn_is_not_loaded_by_requests() -> None:
    node = Node(defaults=("a",))
    Activator(node.residents, ["a"])
    await node.residents.unload("a")
    with pytest.raises(UnknownModel, match="can be loaded: a"):
        async with node.residents.lease("a", "r"):
            pass


async def test_a_default_model_that_is_unloaded_before_its_turn_stays_unloaded() -> None:
    node = Node(defaults=("a", "b", "c"), budget_mb=200)
    node.gate.clear()
    activator = Activator(node.residents, ["a", "b", "c"])
    running = asyncio.create_task(activator.run())
    await node.loading()
    await node.residents.unload("b")
    node.gate.set()
    await running
    assert [node.status(model_id) for model_id in ("a", "b", "c")] == ["loaded", "unloaded", "loaded"]
    assert (activator.state.completed, activator.state.failed) == (["a", "c"], [])
    await node.residents.stop()


async def test_an_engine_that_cannot_be_watched_has_failed_and_leaves_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ScriptedModel, "watch")
    async with asyncio.timeout(5):
        with pytest.raises(LoadFailed, match="The engine scripted failed: AttributeError"):
            await node.residents.ensure(request())
    assert not node.ledger.grants
    assert not node.factory.live


async def test_a_held_model_is_not_unloaded(node: Node) -> None:
    await node.residents.ensure(request(hold_s=10))
    await node.clock.advance(6)
    with pytest.raises(Conflict, match="held for another 4 s") as refusal:
        await node.residents.unload("m")
    assert (refusal.value.code, refusal.value.retry_after) == ("held", 4)
    await node.clock.advance(4)
    await node.residents.unload("m")
    assert node.status("m") == "unloaded"


async def test_unloading_frees_the_model_and_its_grant(node: Node) -> None:
    await node.residents.ensure(request())
    await node.residents.unload("m")
    assert not node.ledger.grants
    assert not node.factory.live
    await node.residents.unload("m")


async def test_unloading_lets_requests_end_and_refuses_new_ones(node: Node) -> None:
    await node.residents.ensure(request())
    async with node.residents.lease("m", "r1") as served:
        with pytest.raises(Conflict, match="1 requests in flight") as refusal:
            await node.residents.unload("m", if_idle=True)
        assert refusal.value.code == "busy"
        unloading = asyncio.create_task(node.residents.unload("m"))
        await settle()
        assert node.status("m") == "draining"
        with pytest.raises(Busy, match="being unloaded"):
            async with node.residents.lease("m", "r2"):
                pass
        again = asyncio.create_task(node.residents.ensure(request()))
        await settle()
        assert not unloading.done()
        assert served.model in node.factory.live
    await unloading
    assert (await again).status == "loaded"
    assert len(node.factory.models) == 2


async def test_an_unload_ends_a_load_under_way(node: Node) -> None:
    node.gate.clear()
    ensuring = asyncio.create_task(node.residents.ensure(request()))
    await node.loading()
    with pytest.raises(Conflict, match="is loading"):
        await node.residents.unload("m", if_idle=True)
    await node.residents.unload("m")
    with pytest.raises(Conflict, match="ended by an unload"):
        await ensuring
    assert not node.ledger.grants


async def test_what_is_not_known_is_told_with_what_is(node: Node) -> None:
    with pytest.raises(UnknownModel, match=r"nothing is\)"):
        await node.residents.unload("m")
    await node.residents.ensure(request("a"))
    await node.residents.unload("a")
    await node.residents.ensure(request("b"))
    with pytest.raises(UnknownModel, match="loaded: b; can be loaded: a"):
        async with node.residents.lease("m", "r"):
            pass


async def test_a_refused_load_leaves_no_record(node: Node) -> None:
    node.missing.add("typo")
    with pytest.raises(UnknownModel, match="no model 'typo'"):
        await node.residents.ensure(request("typo"))
    with pytest.raises(BadRequest, match="no engine 'candle'; it has scripted"):
        await node.residents.ensure(request("other", harness="candle"))
    assert node.residents.reports() == []


async def test_no_room_is_a_conflict_before_anything_starts(node: Node) -> None:
    await node.residents.ensure(request("a"))
    with pytest.raises(Conflict, match="No room for b") as refusal:
        await node.residents.ensure(request("b"))
    assert refusal.value.details["ledger"][0]["granted"] == [{"model_id": "a", "bytes": 64 * MIB}]
    assert node.factory.loading == []
    assert len(node.factory.models) == 1
    assert (await node.residents.ensure(request("b", memory_mb=20))).vram_used_mb == 20


async def test_a_death_is_shown_and_mended_by_the_next_request(node: Node) -> None:
    await node.residents.ensure(request())
    await node.die("m")
    report = node.residents.report("m")
    assert report is not None
    assert (report.status, report.servable.reason) == ("failed", "failed")
    assert report.servable.detail == "Its engine was killed by SIGKILL."
    (failed,) = node.residents.failed()
    assert (failed.id, failed.detail, failed.retry_in_s) == ("m", report.servable.detail, 0)
    assert not node.ledger.grants
    async with node.residents.lease("m", "r") as served:
        assert served.model is node.factory.models[1]
    assert node.located == ["m", "m"]


async def test_a_model_that_keeps_dying_rests_longer_each_time(node: Node) -> None:
    await node.residents.ensure(request())
    await node.die("m")
    async with node.residents.lease("m", "r"):
        pass
    for rest in (2, 4, 8):
        await node.die("m")
        with pytest.raises(LoadFailed, match="SIGKILL") as refusal:
            async with node.residents.lease("m", "r"):
                pass
        assert refusal.value.retry_after == rest
        assert [failed.retry_in_s for failed in node.residents.failed()] == [rest]
        await node.clock.advance(rest)
        async with node.residents.lease("m", "r"):
            pass
    await node.clock.advance(60)
    await node.die("m")
    async with node.residents.lease("m", "r"):
        pass


async def test_somebody_who_asks_by_name_need_not_wait(node: Node) -> None:
    node.factory.refusal = LoadFailed("The disk is full.")
    for _ in range(3):
        with pytest.raises(LoadFailed, match="disk is full"):
            await node.residents.ensure(request())
    with pytest.raises(LoadFailed, match=r"disk is full.*loads it again") as refusal:
        async with node.residents.lease("m", "r"):
            pass
    assert refusal.value.retry_after == 1, "asking by name forgives what was before"
    node.factory.refusal = None
    await node.residents.ensure(request())


async def test_a_dead_model_without_room_to_return_is_no_capacity(node: Node) -> None:
    await node.residents.ensure(request())
    await node.die("m")
    node.ledger.grant("in the way", {"cpu": 90 * MIB})
    with pytest.raises(NoCapacity, match="No room for m"):
        async with node.residents.lease("m", "r"):
            pass
    assert node.status("m") == "failed"
    node.ledger.release("in the way")


async def test_a_request_waits_for_a_load_and_ends_it_when_it_leaves_alone(node: Node) -> None:
    await node.residents.ensure(request())
    await node.die("m")
    node.gate.clear()

    async def use() -> None:
        async with node.residents.lease("m", "r"):
            pass

    task = asyncio.create_task(use())
    await node.loading()
    assert node.residents.requests() == ["r"]
    task.cancel()
    await settle()
    assert node.factory.cancelled_loads == ["m"]
    assert node.status("m") == "failed"
    assert node.residents.requests() == []


async def test_leases_are_counted_and_bounded() -> None:
    node = Node(max_running=1, max_waiting=1)
    await node.residents.ensure(request())
    async with node.residents.lease("m", "r1"), node.residents.lease("m", "r2"):
        (load,) = node.residents.loads()
        assert (load.in_flight, load.queue_depth, load.max_queue_depth) == (1, 1, 1)
        assert node.residents.requests() == ["r1", "r2"]
        with pytest.raises(Busy, match="1 running and 1 waiting"):
            async with node.residents.lease("m", "r3"):
                pass
        await node.clock.advance(5)
    report = node.residents.report("m")
    assert report is not None
    assert (report.in_flight, report.last_used) == (0, 1e9 + 1005)
    assert node.residents.requests() == []
    await node.residents.stop()


async def test_a_caller_has_its_own_bound_at_each_model() -> None:
    node = Node(max_per_caller=2, budget_mb=200)
    await node.residents.ensure(request("m"))
    await node.residents.ensure(request("n"))
    async with node.residents.lease("m", "r1", caller="ann", places=2):
        with pytest.raises(OverLimit, match="2 requests in flight at m"):
            async with node.residents.lease("m", "r2", caller="ann"):
                pass
        async with (
            node.residents.lease("n", "r3", caller="ann"),
            node.residents.lease("m", "r4", caller="ben"),
        ):
            assert [load.in_flight for load in node.residents.loads()] == [3, 1]
    async with node.residents.lease("m", "r5", caller="ann"):
        pass
    await node.residents.stop()


async def test_the_engine_tells_who_waits_as_long_as_it_makes_steps() -> None:
    node = Node(max_running=2)
    await node.residents.ensure(request())
    (model,) = node.factory.models

    def load() -> tuple[int, int, float | None]:
        (found,) = node.residents.loads()
        return found.in_flight, found.queue_depth, found.cache_usage_ratio

    async with node.residents.lease("m", "r1", places=3):
        assert load() == (2, 1, None), "counted, until the engine has told"
        step = EngineStep(running=1, waiting=2, cache_used_tokens=3, cache_total_tokens=4)
        model.report_step(step)
        assert load() == (1, 2, 0.75), "the cache has no room for a second one"
        model.report_step(EngineStep(running=0, waiting=0, cache_total_tokens=4))
        assert load() == (2, 1, 0), "not started yet, or on its way out"
        model.report_step(EngineStep(running=1, waiting=5, cache_used_tokens=3, cache_total_tokens=4))
    assert load() == (0, 0, 0), "no more than are there, whatever was said last"
    assert node.steps[0] == ("m", step)
    await node.residents.stop()


async def test_a_new_engine_does_not_inherit_the_steps_of_the_last_one(node: Node) -> None:
    await node.residents.ensure(request())
    gone = node.factory.models[0]
    step = EngineStep(running=1, waiting=1, cache_used_tokens=1, cache_total_tokens=1)
    gone.report_step(step)
    await node.die("m")
    gone.report_step(step)
    async with node.residents.lease("m", "r"):
        gone.report_step(step)
        (load,) = node.residents.loads()
    assert (load.in_flight, load.cache_usage_ratio) == (1, None)
    assert len(node.steps) == 1


async def test_a_model_comes_back_as_it_was_loaded(node: Node) -> None:
    await node.residents.ensure(request(source="somewhere", memory_mb=10))
    await node.residents.unload("m")
    report = await node.residents.ensure(request())
    assert report.vram_used_mb == 10
    assert node.located == ["somewhere", "somewhere"]


@pytest.mark.parametrize(
    ("before", "now", "loaded"),
    [
        ({"dtype": "float32"}, {"quant": "int8"}, ("int8", None, 1)),
        ({"quant": "int8"}, {"dtype": "float32"}, (None, "float32", 1)),
        ({"quant": "Q4_K_M"}, {"dtype": "float32"}, ("Q4_K_M", "float32", 1)),
        ({"dtype": "float32"}, {"quant": "Q4_K_M"}, ("Q4_K_M", "float32", 1)),
        ({"devices": ["cpu"]}, {"tensor_parallel": 2}, (None, None, 2)),
        ({"tensor_parallel": 2}, {"devices": ["cpu"]}, (None, None, 1)),
        ({"tensor_parallel": 2, "devices": ["cpu", "cpu"], "quant": "int8"}, {}, ("int8", None, 2)),
    ],
)
async def test_what_a_load_says_replaces_what_was_said_before_in_another_way(
    node: Node, before: dict[str, Any], now: dict[str, Any], loaded: tuple[Any, ...]
) -> None:
    await node.residents.ensure(request(**before))
    await node.residents.unload("m")
    await node.residents.ensure(request(**now))
    (plan,) = [model.plan for model in node.factory.live]
    assert (plan.order.quant, plan.order.dtype, plan.order.tensor_parallel) == loaded


@pytest.mark.parametrize("how", ["refused", "failed", "ended", "left alone"])
@pytest.mark.parametrize("default", [True, False])
async def test_only_a_load_that_succeeds_changes_what_is_known_of_a_model(how: str, default: bool) -> None:
    node = Node(defaults=("m",) if default else ())
    await node.residents.ensure(request(source="of m"))
    await node.residents.unload("m")
    if how == "refused":
        node.missing.add("typo")
    elif how == "failed":
        node.factory.refusal = LoadFailed("The disk is full.")
    else:
        node.gate.clear()
    order = asyncio.create_task(node.residents.ensure(request(source="typo", quant="int8", memory_mb=7)))
    if how in ("ended", "left alone"):
        await node.loading()
        if how == "left alone":
            order.cancel()
        else:
            await node.residents.unload("m")
    with pytest.raises((CortexError, asyncio.CancelledError)):
        await order
    node.gate.set()
    node.factory.refusal = None
    await node.clock.advance(60)
    report = await node.residents.ensure(request())
    assert (node.located[-1], report.vram_used_mb) == ("of m", 64)
    (plan,) = [model.plan for model in node.factory.live]
    assert plan.order.quant is None
    await node.residents.stop()


async def test_of_a_model_that_never_loaded_only_the_last_order_is_known(node: Node) -> None:
    node.factory.refusal = LoadFailed("The disk is full.")
    for order in ({"source": "there", "quant": "int8"}, {"source": "here"}):
        with pytest.raises(LoadFailed):
            await node.residents.ensure(request(**order))
    node.factory.refusal = None
    await node.clock.advance(60)
    async with node.residents.lease("m", "r") as served:
        assert served.plan.order.quant is None
    assert node.located == ["there", "here", "here"]


async def test_an_engine_that_fails_oddly_fails_only_its_load(node: Node) -> None:
    async def crash(plan: LoadPlan) -> None:
        raise ZeroDivisionError("plugin")

    node.factory.before_load = crash
    with pytest.raises(LoadFailed, match="The engine scripted failed: ZeroDivisionError"):
        await node.residents.ensure(request())
    assert node.status("m") == "failed"
    assert not node.ledger.grants


async def test_stopping_ends_everything_and_refuses_what_is_new(node: Node) -> None:
    await node.residents.ensure(request("a", memory_mb=10))
    node.gate.clear()
    waiter = asyncio.create_task(node.residents.ensure(request("b", memory_mb=10)))
    await node.loading()
    async with node.residents.lease("a", "r"):
        await node.residents.stop()
        assert not node.factory.live
    with pytest.raises(Busy, match="stopping"):
        await waiter
    with pytest.raises(Busy, match="stopping"):
        await node.residents.ensure(request("a"))
