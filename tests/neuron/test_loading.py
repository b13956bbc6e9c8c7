from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec
import pytest

from cortex.hookspecs import LoadOrder, LoadPlan
from cortex.neuron.admission import Admission
from cortex.neuron.loading import Loader
from cortex.neuron.memory import Ledger
from cortex.neuron.resident import Resident
from cortex.testing.scripted import ScriptedFactory, ScriptedModel
from cortex.wire.errors import BadRequest, CortexError, LoadFailed
from cortex.wire.node import LoadRequest, Progress

MIB = 2**20


def ignore(progress: Progress) -> None:
    pass


class Bench:
    """A loader over scripted engines."""

    def __init__(
        self, budgets: Mapping[str, int], *, available: Mapping[str, int] | None = None, threads: int = 8
    ) -> None:
        self.factory = ScriptedFactory()
        self.ledger = Ledger({device: size * MIB for device, size in budgets.items()})
        self.loader = Loader(
            factories={"scripted": self.factory},
            locate=self.locate,
            ledger=self.ledger,
            available=lambda: {device: size * MIB for device, size in (available or {}).items()},
            devices=[device for device in budgets if device != "cpu" or len(budgets) == 1],
            threads=threads,
        )

    async def locate(self, reference: str, report: object, quant: str | None) -> Path:
        return Path("/models") / reference

    async def devices_of(self, **request: object) -> tuple[str, ...]:
        served = await self.loader.load(LoadRequest(model_id="m", **request), ignore)  # type: ignore[arg-type]
        return served.plan.order.devices


GPUS = {"GPU-a": 100, "GPU-b": 200, "cpu": 100}


@pytest.mark.parametrize(
    ("request_", "devices"),
    [
        ({}, ("GPU-b",)),
        ({"devices": ["0"]}, ("GPU-a",)),
        ({"devices": ["GPU-a"]}, ("GPU-a",)),
        ({"devices": ["cpu"]}, ("cpu",)),
        ({"devices": ["1", "0"]}, ("GPU-b", "GPU-a")),
        ({"devices": ["cpu", "cpu"]}, ("cpu", "cpu")),
        ({"tensor_parallel": 2}, ("GPU-b", "GPU-a")),
        ({"tensor_parallel": 2, "devices": ["0", "1"]}, ("GPU-a", "GPU-b")),
        ({"tensor_parallel": 2, "devices": ["cpu", "cpu"]}, ("cpu", "cpu")),
        ({"tensor_parallel": 2, "devices": ["cpu"]}, ("cpu", "cpu")),
    ],
)
async def test_a_load_gets_the_devices_that_it_names_or_the_roomiest(
    request_: dict[str, object], devices: tuple[str, ...]
) -> None:
    assert await Bench(GPUS).devices_of(**request_) == devices


async def test_a_node_without_gpus_runs_all_ranks_on_its_processor() -> None:
    assert await Bench({"cpu": 100}).devices_of(tensor_parallel=4) == ("cpu",) * 4


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        ({"devices": ["GPU-z"]}, "no device 'GPU-z'; it has GPU-a, GPU-b, cpu, 0, 1"),
        ({"devices": ["7"]}, "no device '7'"),
        ({"devices": ["0", "0"], "tensor_parallel": 2}, "different devices"),
        ({"devices": ["0", "cpu"], "tensor_parallel": 2}, "or cpu alone for all"),
        ({"devices": ["cpu", "cpu", "cpu"], "tensor_parallel": 2}, "different devices"),
        ({"devices": ["0", "0"]}, "different devices"),
        ({"devices": ["0", "1"], "tensor_parallel": 1}, "different devices"),
        ({"devices": []}, "different devices"),
        ({"tensor_parallel": 65, "devices": ["cpu"]}, "at most 64"),
        ({"tensor_parallel": 3}, "2 devices; tensor_parallel = 3"),
        ({"harness": "candle"}, "no engine 'candle'"),
    ],
)
async def test_what_the_node_does_not_have_is_refused(request_: dict[str, object], words: str) -> None:
    bench = Bench(GPUS)
    with pytest.raises(BadRequest, match=words):
        await bench.devices_of(**request_)
    assert not bench.ledger.grants


async def test_a_model_too_large_for_two_contexts_gets_all_that_the_device_has() -> None:
    bench = Bench({"cpu": 50})
    served = await bench.loader.load(LoadRequest(model_id="m"), ignore)
    assert served.plan.order.memory_bytes == 50 * MIB
    assert bench.ledger.free("cpu") == 0


@pytest.mark.parametrize(
    ("budgets", "devices", "expected"),
    [
        ({"GPU-a": 100, "cpu": 80}, ["0"], 10 * MIB),
        ({"GPU-a": 100, "cpu": 10_000}, ["0"], 2**30),
        ({"GPU-a": 100, "cpu": 80}, ["cpu"], 2**30),
        ({"GPU-a": 100}, None, 2**30),
    ],
)
async def test_what_is_kept_on_the_host_is_bounded_by_the_hosts_memory(
    budgets: dict[str, int], devices: list[str] | None, expected: int
) -> None:
    """Of a model that runs there the engine takes it out of the budget."""
    served = await Bench(budgets).loader.load(LoadRequest(model_id="m", devices=devices), ignore)
    assert served.plan.order.state_bytes == expected


@pytest.mark.parametrize(("measured", "expected"), [(40, 5), (0, 0), (500, 10)])
async def test_what_is_kept_on_the_host_is_bounded_by_what_others_leave_of_it(
    monkeypatch: pytest.MonkeyPatch, measured: int, expected: int
) -> None:
    """So that the model gets fewer states, and is not refused for them."""
    bench = Bench({"GPU-a": 100, "cpu": 80}, available={"cpu": measured})
    plan = bench.factory.plan

    def all_that_is_allowed(order: LoadOrder) -> LoadPlan:
        return with_host(plan, order.state_bytes)(order)

    monkeypatch.setattr(bench.factory, "plan", all_that_is_allowed)
    served = await bench.loader.load(LoadRequest(model_id="m", devices=["0"]), ignore)
    assert served.plan.order.state_bytes == expected * MIB
    assert bench.ledger.granted("cpu") == expected * MIB


async def test_a_host_that_is_smaller_than_the_device_is_no_bound_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sizes of each device are held against its own budget."""
    bench = Bench({"GPU-a": 50, "cpu": 1000})
    monkeypatch.setattr(bench.factory, "plan", with_host(bench.factory.plan, 60 * MIB))
    bench.factory.bytes_per_device = 40 * MIB
    served = await bench.loader.load(LoadRequest(model_id="m"), ignore)
    assert served.plan.order.memory_bytes is None
    assert {grant.device: grant.bytes // MIB for grant in bench.ledger.grants} == {"GPU-a": 40, "cpu": 60}


async def test_a_report_counts_a_models_devices_and_shows_what_it_has_of_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bench = Bench({"GPU-a": 100, "cpu": 100})
    monkeypatch.setattr(bench.factory, "plan", with_host(bench.factory.plan, 5 * MIB))
    request = LoadRequest(model_id="m", memory_mb=40)
    resident = Resident(request, Admission(), configured=False)
    resident.move("loading")
    resident.loaded(await bench.loader.load(request, ignore), now=0, wall=0, seconds=0)
    report = resident.report()
    assert (report.devices, report.vram_used_mb) == (["GPU-a"], 40)
    assert report.bytes_per_device == {"GPU-a": 40 * MIB, "cpu": 5 * MIB}


def with_host(plan: Callable[[LoadOrder], LoadPlan], size: int) -> Callable[[LoadOrder], LoadPlan]:
    """Plans that take so much of the host beside the devices."""

    def both(order: LoadOrder) -> LoadPlan:
        planned = plan(order)
        return msgspec.structs.replace(planned, bytes_per_device={**planned.bytes_per_device, "cpu": size})

    return both


async def test_a_budget_that_was_asked_for_is_not_made_smaller() -> None:
    with pytest.raises(CortexError, match="asks for 60 MB"):
        await Bench({"cpu": 50}).loader.load(LoadRequest(model_id="m", memory_mb=60), ignore)


async def test_memory_that_others_hold_is_not_granted() -> None:
    with pytest.raises(CortexError, match="Only 10 MB of the device are free"):
        await Bench({"cpu": 100}, available={"cpu": 10}).loader.load(LoadRequest(model_id="m"), ignore)


async def test_threads_are_divided_among_the_models() -> None:
    bench = Bench({"cpu": 1000}, threads=4)
    threads = []
    for name in ("a", "b", "c", "d", "e"):
        served = await bench.loader.load(LoadRequest(model_id=name), ignore)
        threads.append(served.plan.order.threads)
    assert threads == [4, 2, 1, 1, 1]


async def test_threads_are_divided_anew_whenever_a_model_comes_or_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads: dict[str, int] = {}

    def set_threads(model: ScriptedModel, count: int) -> None:
        threads[model.plan.order.model_id] = count

    monkeypatch.setattr(ScriptedModel, "set_threads", set_threads, raising=False)
    bench = Bench({"cpu": 1000}, threads=5)
    served = {}
    for name in ("a", "b", "c"):
        served[name] = await bench.loader.load(LoadRequest(model_id=name), ignore)
    assert threads == {"a": 2, "b": 2, "c": 1}
    await bench.loader.close(served["a"])
    assert (threads["b"], threads["c"]) == (3, 2)
    await bench.loader.close(served["b"])
    assert threads["c"] == 5
    for name in ("d", "e", "f", "g", "h"):
        await bench.loader.load(LoadRequest(model_id=name), ignore)
    assert {threads[name] for name in "cdefgh"} == {1}, "nobody is left without one"


async def test_a_model_that_cannot_be_told_its_threads_spoils_nobodys_load(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Else the one that is loaded would go on to run, with its grant, and nobody would know of it."""
    bench = Bench({"cpu": 1000})
    await bench.loader.load(LoadRequest(model_id="a"), ignore)

    def set_threads(model: ScriptedModel, count: int) -> None:
        raise RuntimeError(f"cannot be told: {model.plan.order.model_id}")

    monkeypatch.setattr(ScriptedModel, "set_threads", set_threads)
    served = await bench.loader.load(LoadRequest(model_id="b"), ignore)
    assert "cannot be told: a" in caplog.text
    await bench.loader.close(served)
    assert [grant.model_id for grant in bench.ledger.grants] == ["a"]


async def test_a_failed_load_gives_its_grant_back() -> None:
    bench = Bench({"cpu": 100})
    bench.factory.refusal = LoadFailed("no luck")
    with pytest.raises(LoadFailed):
        await bench.loader.load(LoadRequest(model_id="m"), ignore)
    assert not bench.ledger.grants


async def test_closing_gives_the_grant_back() -> None:
    bench = Bench({"cpu": 100})
    served = await bench.loader.load(LoadRequest(model_id="m"), ignore)
    assert bench.ledger.granted("cpu") == 64 * MIB
    await bench.loader.close(served)
    assert not bench.ledger.grants
    assert not bench.factory.live


async def test_a_node_without_engines_says_so() -> None:
    loader = Loader(
        factories={},
        locate=Bench({"cpu": 1}).locate,
        ledger=Ledger({"cpu": 1}),
        available=dict,
        devices=["cpu"],
        threads=1,
    )
    with pytest.raises(BadRequest, match="no engine installed"):
        await loader.load(LoadRequest(model_id="m"), ignore)
