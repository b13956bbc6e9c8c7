"""The worker's loop in a thread, with a model that waits to be let on: what happens in which step."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from cortex.hookspecs import EngineStep, Sampling
from cortex.neuron.engine.blocks import BlockPool
from cortex.neuron.engine.channel import Channel, PeerGone
from cortex.neuron.engine.loop import Loop
from cortex.neuron.engine.messages import (
    Broken,
    Cancel,
    Generate,
    Order,
    Output,
    Report,
    Step,
    Threads,
    Unframer,
    decode_report,
    frame,
)
from cortex.neuron.engine.pace import Pace
from cortex.neuron.engine.ranks import Ranks
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.nn.placement import Share
from cortex.neuron.nn.plan import StepPlan

VOCAB = 20


class GatedRunner:
    """Always says token 7; each step is announced and waits for `let_on`, then does as `fails` says."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.most_threads: int | None = None
        self.plans: list[StepPlan] = []
        self.fails: Exception | None = None
        self.value = 1.0
        self._entered = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)

    def logits(self, plan: StepPlan, sampled: Tensor | None = None) -> Tensor:
        self.plans.append(plan)
        self._entered.release()
        assert self._gate.acquire(timeout=10)
        if self.fails is not None:
            raise self.fails
        wanted = plan.chunk.wanted if plan.chunk else plan.wanted  # of one layer: it is through at once
        logits = torch.zeros(len(wanted), VOCAB)
        logits[:, 7] = self.value
        return logits

    def wait(self) -> StepPlan:
        """Until a step has begun."""
        assert self._entered.acquire(timeout=10)
        return self.plans[-1]

    def let_on(self) -> None:
        self._gate.release()


class Bench:
    """A loop in a thread, and the node's side of its socket."""

    def __init__(self, *, running: int = 1, wait: float | None = None) -> None:
        self.runner = GatedRunner()
        self.now = 0.0
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(10)
        self._unframer = Unframer()
        self._reports: list[Report] = []
        self._theirs = theirs
        scheduler = Scheduler(
            BlockPool(64, 4),
            context=64,
            pace=Pace(4, 1, 1000),
            vocab=VOCAB,
            clock=lambda: self.now,
            max_running=running,
            max_wait_s=wait,
        )
        ranks = Ranks(Share())
        self.loop = Loop(Channel(theirs), self.runner, scheduler, ranks, lambda: self.now)  # type: ignore[arg-type]
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.loop.run()
        except PeerGone:
            pass
        finally:
            self._theirs.close()

    def send(self, *orders: Order) -> None:
        self.sock.sendall(b"".join(frame(order) for order in orders))

    def report(self) -> Report | None:
        """The next report; None once the loop has ended."""
        while not self._reports:
            data = self.sock.recv(65536)
            if not data:
                return None
            self._reports += [decode_report(body) for body in self._unframer.feed(data)]
        return self._reports.pop(0)

    def step(self) -> list[Output]:
        """The outputs of the next step."""
        report = self.report()
        assert isinstance(report, Step)
        return report.outputs

    def done(self) -> EngineStep:
        """What the next step did."""
        report = self.report()
        assert isinstance(report, Step)
        assert report.done is not None
        return report.done

    def run_step(self) -> StepPlan:
        """Let the next step be made."""
        plan = self.runner.wait()
        self.runner.let_on()
        return plan

    def close(self) -> None:
        self.sock.close()
        for _ in range(10):
            self.runner.let_on()
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.close()


@pytest.fixture
def wide() -> Iterator[Bench]:
    """With room for several sequences, of which one waits for ten seconds at most."""
    bench = Bench(running=2, wait=10.0)
    yield bench
    bench.close()


def generate(key: int, length: int = 3, max_tokens: int = 50, **sampling: Any) -> Generate:
    settings = Sampling(max_tokens=max_tokens, temperature=0, **sampling)
    return Generate(key=key, request_id=f"r{key}", ids=[key] * length, sampling=settings)


def test_a_cancel_in_prefill_takes_effect_before_the_next_step(bench: Bench) -> None:
    bench.send(generate(1, length=12))
    assert bench.runner.wait().ids == [1] * 4
    bench.send(Cancel(key=1), generate(2))
    bench.runner.let_on()
    assert bench.runner.wait().ids == [2] * 3
    assert len(bench.runner.plans) == 2


def test_a_cancel_in_decode_takes_effect_before_the_next_step(bench: Bench) -> None:
    bench.send(generate(1))
    bench.runner.wait()
    bench.runner.let_on()
    assert bench.step() == [Output(key=1, ids=[7], cached_tokens=0)]
    assert bench.runner.wait().ids == [7]
    bench.send(Cancel(key=1), generate(2))
    bench.runner.let_on()
    assert [output.key for output in bench.step()] == [1]  # the step that was under way
    assert bench.runner.wait().ids == [2] * 3


def test_a_cancel_before_the_first_step_leaves_nothing_to_do(bench: Bench) -> None:
    bench.send(generate(1), Cancel(key=1), generate(2))
    assert bench.runner.wait().ids == [2] * 3


def test_a_closed_socket_ends_the_loop_after_the_step_under_way(bench: Bench) -> None:
    bench.send(generate(1, length=12))
    bench.runner.wait()
    bench.sock.close()
    bench.runner.let_on()
    bench.thread.join(10)
    assert len(bench.runner.plans) == 1


def test_a_step_that_breaks_fails_its_sequences_and_the_next_ones_run(bench: Bench) -> None:
    bench.runner.fails = ValueError("surprise")
    bench.send(generate(1), generate(2))
    bench.run_step()
    (output,) = bench.step()
    assert output.key == 1
    assert output.error == "The model failed in this step (ValueError: surprise)."
    bench.runner.fails = None
    assert bench.runner.wait().ids == [2] * 3


def test_whoever_was_not_in_a_broken_step_is_computed_anew(wide: Bench) -> None:
    wide.send(generate(1, length=8), generate(2, length=8, max_tokens=3))
    assert wide.run_step().ids == [1] * 4
    assert wide.step() == []
    wide.runner.wait()
    wide.runner.fails = ValueError("surprise")
    wide.runner.let_on()
    assert [output.key for output in wide.step()] == [1]
    wide.runner.fails = None
    plans = [wide.run_step() for _ in range(3)]
    assert [plan.segments[0].start for plan in plans] == [0, 4, 8]
    assert [output.ids for _ in range(3) for output in wide.step()] == [[7], [7]]


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
    ],
    ids=["allocator", "cuda", "python"],
)
def test_a_full_memory_fails_the_requests_in_the_step_and_ends_the_worker(
    bench: Bench, error: Exception
) -> None:
    bench.runner.fails = error
    bench.send(generate(1), generate(2))
    bench.run_step()
    (output,) = bench.step()
    assert output.key == 1
    assert output.error == "The model ran out of memory in a step; a shorter prompt may fit."
    assert bench.report() == Broken(reason="ran out of memory in a step")
    assert bench.report() is None
    assert len(bench.runner.plans) == 1


def test_values_that_are_not_numbers_fail_the_requests_in_the_step_and_end_the_worker(bench: Bench) -> None:
    bench.runner.value = float("nan")
    bench.send(generate(1), generate(2))
    bench.run_step()
    (output,) = bench.step()
    assert output.key == 1
    assert "values that are not numbers" in str(output.error)
    report = bench.report()
    assert isinstance(report, Broken)
    assert report.reason == "computed values that are not numbers; the weights may be damaged"
    assert bench.report() is None


def test_a_running_sequence_that_was_not_in_the_step_is_not_at_fault_either(wide: Bench) -> None:
    wide.send(generate(1, length=8), generate(2, length=8))
    assert wide.run_step().ids == [1] * 4
    assert wide.step() == []
    wide.runner.wait()
    wide.runner.value = float("nan")
    wide.runner.let_on()
    assert [output.key for output in wide.step()] == [1]
    assert isinstance(wide.report(), Broken)


def test_a_broken_device_fails_the_requests_in_the_step_and_ends_the_worker(bench: Bench) -> None:
    bench.runner.device = torch.device("cuda")
    bench.runner.fails = RuntimeError("CUDA error: an illegal memory access was encountered")
    bench.send(generate(1), generate(2))
    bench.run_step()
    (output,) = bench.step()
    assert output.key == 1
    assert "illegal memory access" in str(output.error)
    report = bench.report()
    assert isinstance(report, Broken)
    assert "illegal memory access" in report.reason
    bench.thread.join(10)
    assert not bench.thread.is_alive()


def test_a_sequence_that_waited_too_long_is_told_so_between_two_steps(wide: Bench) -> None:
    wide.send(generate(1), generate(2))
    for _ in range(4):
        wide.run_step()
        wide.step()
    wide.runner.wait()
    wide.send(generate(3))
    wide.runner.let_on()
    wide.step()
    wide.runner.wait()
    wide.now = 11.0
    wide.runner.let_on()
    assert [output.key for output in wide.step()] == [1, 2]
    report = wide.report()
    assert isinstance(report, Step)
    assert report.done is None, "it is no step"
    (late,) = report.outputs
    assert (late.key, late.code) == (3, "busy")


def test_a_refusal_comes_without_a_step(bench: Bench) -> None:
    bench.send(generate(1, length=64))
    report = bench.report()
    assert isinstance(report, Step)
    assert report.done is None
    assert "The prompt has 64 tokens" in str(report.outputs[0].error)
    bench.send(generate(2))
    assert bench.runner.wait().ids == [2] * 3


def test_each_step_tells_what_it_did(wide: Bench) -> None:
    wide.send(generate(1, length=6), generate(2, length=6), generate(3))
    first, second, third = [(wide.run_step(), wide.done())[1] for _ in range(3)]
    assert (first.prefill_tokens, first.decode_tokens, first.running, first.waiting) == (4, 0, 2, 1)
    assert first.prefix_queried_tokens == 0, "what was known of a prompt is told with its first token"
    assert (first.cache_used_tokens, first.cache_total_tokens) == (2 * 56, 256)
    assert (second.prefill_tokens, second.prefix_queried_tokens) == (4, 6)
    assert (third.prefill_tokens, third.decode_tokens) == (0, 1), "what decode takes is to be known first"


def test_a_prompt_that_is_known_is_told_as_a_hit(bench: Bench) -> None:
    bench.send(generate(1, length=9, max_tokens=1))
    while not any(output.finish for output in (bench.run_step(), bench.step())[1]):
        pass
    bench.send(generate(1, length=9, max_tokens=1))
    bench.run_step()
    report = bench.report()
    assert isinstance(report, Step)
    assert report.done is not None
    assert (report.done.prefix_queried_tokens, report.done.prefix_hit_tokens) == (9, 8)
    assert report.outputs[0].cached_tokens == 8
    assert (report.done.cache_used_tokens, report.done.running) == (0, 0)


def test_how_long_a_step_took_is_told_and_paces_the_next_ones(bench: Bench) -> None:
    bench.send(generate(1))
    bench.runner.wait()
    bench.now = 0.25
    bench.runner.let_on()
    assert bench.done().seconds == 0.25


def test_the_nodes_word_on_threads_is_followed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    bench.send(Threads(threads=3), generate(1))
    bench.runner.wait()
    assert told == [3]


def test_no_more_threads_are_taken_than_were_measured_to_help(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    bench.runner.most_threads = 2
    bench.send(Threads(threads=3), Threads(threads=1), generate(1))
    bench.runner.wait()
    assert told == [2, 1]


def test_stop_ids_are_withheld_until_there_are_enough_tokens(bench: Bench) -> None:
    """The model says 7 all the time, and after that, of all tokens that are as likely, the first one."""
    bench.send(generate(1, max_tokens=9, stop_ids=(7,), min_tokens=2))
    for _ in range(3):
        bench.run_step()
    outputs = [output for _ in range(3) for output in bench.step()]
    assert [output.ids for output in outputs] == [[0], [0], []]
    assert outputs[-1].finish == "stop"


def test_log_probabilities_that_were_asked_for_go_out(bench: Bench) -> None:
    bench.send(generate(1, logprobs=1))
    bench.run_step()
    (output,) = bench.step()
    assert output.logprobs is not None
    (told,) = output.logprobs
    assert told.id == 7
    assert told.top == [(7, told.logprob)]
