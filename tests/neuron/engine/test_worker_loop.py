"""The worker's loop in a thread, with a model that waits to be let on: what happens in which step."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from cortex.hookspecs import Sampling
from cortex.neuron.engine.channel import Channel, PeerGone
from cortex.neuron.engine.messages import (
    Cancel,
    Generate,
    Order,
    Output,
    Step,
    Unframer,
    decode_report,
    frame,
)
from cortex.neuron.engine.scheduler import Scheduler
from cortex.neuron.engine.worker import Loop
from cortex.neuron.nn.plan import StepPlan

VOCAB = 20


class GatedRunner:
    """Always says token 7; each step is announced and waits for `let_on`, then does as `fails` says."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.plans: list[StepPlan] = []
        self.fails: Exception | None = None
        self.value = 1.0
        self._entered = threading.Semaphore(0)
        self._gate = threading.Semaphore(0)

    def logits(self, plan: StepPlan) -> Tensor:
        self.plans.append(plan)
        self._entered.release()
        assert self._gate.acquire(timeout=10)
        if self.fails is not None:
            raise self.fails
        logits = torch.zeros(len(plan.wanted), VOCAB)
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

    def __init__(self) -> None:
        self.runner = GatedRunner()
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(10)
        self._unframer = Unframer()
        self._theirs = theirs
        scheduler = Scheduler(slots=1, context=64, prefill_chunk=4, vocab=VOCAB, clock=lambda: 0.0)
        self.loop = Loop(Channel(theirs), self.runner, scheduler)  # type: ignore[arg-type]
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

    def step(self) -> list[Output]:
        """The outputs of the next step."""
        while True:
            bodies = self._unframer.feed(self.sock.recv(65536))
            if bodies:
                (body,) = bodies
                report = decode_report(body)
                assert isinstance(report, Step)
                return report.outputs


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.sock.close()
    for _ in range(10):
        bench.runner.let_on()
    bench.thread.join(10)
    assert not bench.thread.is_alive()


def generate(key: int, length: int = 3, max_tokens: int = 50) -> Generate:
    settings = Sampling(max_tokens=max_tokens, temperature=0)
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
    assert bench.step() == [Output(key=1, ids=[7])]
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


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "ran out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory"), "ran out of memory"),
        (ValueError("surprise"), "ValueError: surprise"),
    ],
)
def test_a_step_that_breaks_fails_its_sequence_and_the_next_one_runs(
    bench: Bench, error: Exception, said: str
) -> None:
    bench.runner.fails = error
    bench.send(generate(1), generate(2))
    bench.runner.wait()
    bench.runner.let_on()
    (output,) = bench.step()
    assert output.key == 1
    assert output.error is not None
    assert said in output.error
    bench.runner.fails = None
    assert bench.runner.wait().ids == [2] * 3


def test_a_broken_device_fails_every_sequence_and_ends_the_worker(bench: Bench) -> None:
    bench.runner.device = torch.device("cuda")
    bench.runner.fails = RuntimeError("CUDA error: an illegal memory access was encountered")
    bench.send(generate(1), generate(2))
    bench.runner.wait()
    bench.runner.let_on()
    outputs = bench.step()
    assert [output.key for output in outputs] == [1, 2]
    assert all("illegal memory access" in str(output.error) for output in outputs)
    bench.thread.join(10)
    assert not bench.thread.is_alive()


def test_values_that_are_not_numbers_are_a_clear_error(bench: Bench) -> None:
    bench.runner.value = float("nan")
    bench.send(generate(1))
    bench.runner.wait()
    bench.runner.let_on()
    (output,) = bench.step()
    assert "not numbers" in str(output.error)
