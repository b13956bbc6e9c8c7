"""The worker in a real process, over a real socket, with a tiny model."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.numpy import load_file, save_file

from cortex.hookspecs import Sampling
from cortex.neuron.engine import entry, runner
from cortex.neuron.engine.messages import (
    Broken,
    Cancel,
    Generate,
    Load,
    LoadProgress,
    LoadRefused,
    Order,
    Output,
    Ready,
    Report,
    Step,
    Threads,
    Unframer,
    decode_report,
    frame,
)
from cortex.neuron.engine.runner import load_runner
from cortex.neuron.models.reading import read_shape
from cortex.neuron.nn import matrix
from cortex.neuron.nn.placement import Placement
from cortex.neuron.nn.plan import Segment, StepPlan
from cortex.neuron.nn.staging import Staging
from cortex.neuron.weights.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

context = multiprocessing.get_context("forkserver")


class Worker:
    """The node's side of a worker."""

    def __init__(self) -> None:
        self._sock, theirs = socket.socketpair()
        self._sock.settimeout(15)
        self._unframer = Unframer()
        self._reports: list[Report] = []
        self.process: ForkServerProcess = context.Process(target=entry.main, args=(theirs, "cpu", 1))
        self.process.start()
        theirs.close()

    def send(self, *orders: Order) -> None:
        """All in one write, so that the worker finds them together."""
        self._sock.sendall(b"".join(frame(order) for order in orders))

    def report(self) -> Report | None:
        """The next report; None once the worker is gone."""
        while not self._reports:
            data = self._sock.recv(65536)
            if not data:
                return None
            self._reports += [decode_report(body) for body in self._unframer.feed(data)]
        return self._reports.pop(0)

    def outputs(self) -> Iterator[Output]:
        while True:
            step = self.report()
            assert isinstance(step, Step), step
            yield from step.outputs

    def answer(self, key: int) -> tuple[list[int], Output]:
        """All tokens of a sequence, and its last output; others' outputs are dropped."""
        ids: list[int] = []
        for output in self.outputs():
            if output.key == key:
                ids += output.ids
                if output.finish or output.error:
                    return ids, output
        raise AssertionError("unreachable")

    def close(self) -> int | None:
        """Leave, as a node does that unloads; the worker's exit code."""
        self._sock.close()
        self.process.join(10)
        return self.process.exitcode

    def kill(self) -> None:
        with contextlib.suppress(ValueError):
            self.process.kill()
            self.process.join()
        self._sock.close()


@pytest.fixture(scope="module", autouse=True)
def warm_server() -> Iterator[None]:
    context.set_forkserver_preload(["cortex.neuron.engine.worker"])
    yield
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def started() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.kill()


def load(path: Path, **changes: Any) -> Load:
    order: dict[str, Any] = {
        "path": str(path),
        "dtype": "float32",
        "device": "cpu",
        "context": 2048,
        "cache_tokens": 4096,
        "prefill_chunk": 16,
        "threads": 1,
    }
    return Load(**{**order, **changes})


def generate(key: int, length: int, max_tokens: int = 5, **sampling: Any) -> Generate:
    ids = [(7 * index) % 90 for index in range(length)]
    settings = {"temperature": 0.0, **sampling}
    return Generate(
        key=key, request_id=f"r{key}", ids=ids, sampling=Sampling(max_tokens=max_tokens, **settings)
    )


@pytest.fixture
def worker(started: Worker, tiny_model: Path) -> Worker:
    """With the tiny model loaded."""
    started.send(load(tiny_model))
    while not isinstance(report := started.report(), Ready):
        assert isinstance(report, LoadProgress), report
    return started


def spoil(tiny_model: Path, folder: Path) -> None:
    """A copy of the model with one weight that is not a number."""
    for file in tiny_model.iterdir():
        if file.suffix == ".safetensors":
            weights = load_file(file)
            weights["model.norm.weight"][3] = float("nan")
            save_file(weights, folder / file.name)
        else:
            shutil.copy(file, folder)


def greedy(path: Path, ids: list[int], count: int) -> list[int]:
    """What the model itself says, without the engine around it."""
    placement = Placement(torch.device("cpu"), "float32")
    made = load_runner(path, placement, cache_rows=2048, report=lambda done, total: None)
    ids = list(ids)
    for _ in range(count):
        segment = Segment(0, len(ids), [(0, len(ids))], slot=0)
        logits = made.logits(StepPlan(ids, [segment], [len(ids) - 1]))
        ids.append(int(logits.argmax()))
    return ids[-count:]


def test_after_a_load_nothing_is_kept_for_weights_on_their_way(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    staging = Staging()
    for module in (matrix, runner):
        monkeypatch.setattr(module, "STAGING", staging)
    kept: list[int] = []
    placement = Placement(torch.device("cpu"), "packed16")
    load_runner(
        tiny_model, placement, cache_rows=16, report=lambda done, total: kept.append(staging.kept_bytes)
    )
    assert max(kept) > 0
    assert staging.kept_bytes == 0


def test_a_load_reports_its_progress_and_its_size(started: Worker, tiny_model: Path) -> None:
    started.send(load(tiny_model))
    told = []
    while isinstance(report := started.report(), LoadProgress):
        told.append(report)
    assert isinstance(report, Ready)
    with open_checkpoint(tiny_model) as checkpoint:
        assert report.weight_bytes == read_shape(checkpoint).weight_bytes("float32")
    assert report.cache_bytes == 4096 * 2 * 2 * 2 * 8 * 4
    assert told[-1].done == told[-1].total > 0
    assert [report.done for report in told] == sorted(report.done for report in told)


def test_greedy_text_is_the_models_own_and_comes_token_by_token(worker: Worker, tiny_model: Path) -> None:
    order = generate(1, length=40, max_tokens=6)
    worker.send(order)
    outputs = []
    for output in worker.outputs():
        outputs.append(output)
        if output.finish:
            break
    assert [token for output in outputs for token in output.ids] == greedy(tiny_model, order.ids, 6)
    assert [len(output.ids) for output in outputs] == [1] * 6
    assert outputs[-1].finish == "length"
    assert outputs[-1].timings is not None
    assert outputs[-1].timings.prefill_ms > 0
    assert outputs[-1].timings.decode_ms > 0


def test_a_seed_repeats_and_another_does_not(worker: Worker) -> None:
    texts = []
    for key, seed in enumerate([3, 3, 4]):
        worker.send(generate(key, length=5, max_tokens=12, temperature=1.5, top_p=0.95, seed=seed))
        texts.append(worker.answer(key)[0])
    assert texts[0] == texts[1] != texts[2]


def test_eight_at_once_say_what_they_say_alone(worker: Worker) -> None:
    lengths = (1, 40, 3, 90, 17, 200, 64, 33)
    settings: list[dict[str, Any]] = [{}, {"temperature": 1.2, "seed": 4}, {"repetition_penalty": 1.3}, {}]

    def orders(first: int) -> list[Generate]:
        return [
            generate(first + index, length, 20, **settings[index % 4]) for index, length in enumerate(lengths)
        ]

    alone = []
    for order in orders(1):
        worker.send(order)
        alone.append(worker.answer(order.key)[0])
    together = orders(11)
    worker.send(*together)
    texts: dict[int, list[int]] = {order.key: [] for order in together}
    most = 0
    while len(texts) > most:
        step = worker.report()
        assert isinstance(step, Step)
        assert step.done is not None
        assert step.done.running <= 8
        for output in step.outputs:
            texts[output.key] += output.ids
            most += output.finish is not None
    assert list(texts.values()) == alone
    assert (step.done.running, step.done.waiting, step.done.cache_used_tokens) == (0, 0, 0)


def test_a_cache_that_is_too_small_for_all_gives_the_same_texts(started: Worker, tiny_model: Path) -> None:
    """A reserve of one token lets all start, and most of them have to give way and start again."""
    started.send(load(tiny_model, context=256, cache_tokens=256))
    while not isinstance(started.report(), Ready):
        pass
    orders = [generate(key, 10 * key, 70, reserve=1) for key in range(1, 6)]
    started.send(*orders)
    texts: dict[int, list[int]] = {order.key: [] for order in orders}
    preempted = ended = 0
    while ended < len(orders):
        step = started.report()
        assert isinstance(step, Step)
        assert step.done is not None
        preempted += step.done.preemptions
        for output in step.outputs:
            texts[output.key] += output.ids
            ended += output.finish is not None
    assert preempted >= 1
    assert texts == {order.key: greedy(tiny_model, order.ids, 70) for order in orders}


def test_the_turn_that_follows_finds_what_the_turn_before_left(worker: Worker) -> None:
    first = generate(1, length=50, max_tokens=10)
    worker.send(first)
    outputs = []
    for output in worker.outputs():
        outputs.append(output)
        if output.finish:
            break
    assert [output.cached_tokens for output in outputs] == [0, *[None] * 9]
    said = [token for output in outputs for token in output.ids]
    worker.send(Generate(key=2, request_id="r2", ids=[*first.ids, *said, 5, 6], sampling=first.sampling))
    assert next(worker.outputs()).cached_tokens == 59


def test_a_hybrid_goes_on_from_the_state_of_the_turn_before(
    started: Worker, make_tiny: Callable[..., Any]
) -> None:
    path = make_tiny("qwen3_5_text").directory
    started.send(load(path, context=256, cache_tokens=512, checkpoints=4))
    while not isinstance(report := started.report(), Ready):
        assert isinstance(report, LoadProgress), report
    first = generate(1, length=50, max_tokens=10)
    started.send(first)
    said, _ = started.answer(1)
    assert said == greedy(path, first.ids, 10)
    second = Generate(key=2, request_id="r2", ids=[*first.ids, *said, 5, 6], sampling=first.sampling)
    started.send(second)
    outputs = started.outputs()
    head = next(outputs)
    assert head.cached_tokens == 59
    assert head.ids + [token for _ in range(9) for token in next(outputs).ids] == greedy(path, second.ids, 10)


def test_threads_are_the_nodes_to_change_while_it_works(worker: Worker) -> None:
    worker.send(generate(1, length=3, max_tokens=300), Threads(threads=2))
    before = next(worker.outputs())
    worker.send(Threads(threads=1))
    assert before.ids
    assert worker.answer(1)[1].finish == "length"


def test_damaged_weights_are_told_and_end_the_worker(
    started: Worker, tiny_model: Path, tmp_path: Path
) -> None:
    spoil(tiny_model, tmp_path)
    started.send(load(tmp_path))
    while not isinstance(started.report(), Ready):
        pass
    started.send(generate(1, length=20))
    assert "not numbers" in str(next(started.outputs()).error)
    report = started.report()
    assert isinstance(report, Broken)
    assert "not numbers" in report.reason
    assert started.report() is None
    assert started.close() == 0


def test_a_sequence_that_is_cancelled_in_prefill_makes_room_at_once(
    started: Worker, tiny_model: Path
) -> None:
    """The second waits for the only place; it can only speak before the first if that one is gone."""
    started.send(load(tiny_model, max_running=1))
    while not isinstance(started.report(), Ready):
        pass
    worker = started
    worker.send(generate(1, length=2000), generate(2, length=3))
    worker.send(Cancel(key=1))
    spoke = []
    for output in worker.outputs():
        spoke.append(output.key)
        if output.finish:
            break
    assert spoke == [2] * 5


def test_a_sequence_that_is_cancelled_in_decode_makes_room_at_once(started: Worker, tiny_model: Path) -> None:
    started.send(load(tiny_model, max_running=1))
    while not isinstance(started.report(), Ready):
        pass
    worker = started
    worker.send(generate(1, length=3, max_tokens=2000), generate(2, length=3))
    outputs = worker.outputs()
    assert next(outputs).key == 1
    worker.send(Cancel(key=1))
    finishes = []
    for output in outputs:
        if output.finish:
            finishes.append(output.key)
            break
    assert finishes == [2]


def test_what_cannot_be_run_is_refused_and_the_worker_goes_on(worker: Worker) -> None:
    worker.send(generate(1, length=5000))
    assert "The prompt has 5000 tokens" in str(worker.answer(1)[1].error)
    worker.send(generate(2, length=4))
    assert worker.answer(2)[1].finish == "length"


@pytest.mark.parametrize(
    ("damage", "changes", "said"),
    [
        (lambda content: content[: len(content) // 2], {}, "tensor"),
        (lambda content: b"\xff" * 8 + content[8:], {}, "a header of"),
        (bytes, {"dtype": "int3"}, "The dtype 'int3' is unknown"),
        (bytes, {"context": 9000}, "cannot serve a context of 9000"),
        (bytes, {"cache_tokens": 2047}, "A cache of 2047 tokens"),
        (bytes, {"threads": 0}, "could not be loaded"),
    ],
)
def test_a_load_that_cannot_be_is_refused_with_the_reason(
    started: Worker, tiny_model: Path, tmp_path: Path, damage: Any, changes: dict[str, Any], said: str
) -> None:
    for file in tiny_model.iterdir():
        content = file.read_bytes()
        (tmp_path / file.name).write_bytes(damage(content) if file.suffix == ".safetensors" else content)
    started.send(load(tmp_path, **changes))
    while isinstance(report := started.report(), LoadProgress):
        pass
    assert isinstance(report, LoadRefused)
    assert report.code == "load_failed"
    assert said in report.message
    assert started.report() is None  # the worker ends after it
    assert started.close() == 0


def test_a_worker_without_work_ends_with_its_socket(worker: Worker) -> None:
    assert worker.close() == 0


def test_a_worker_ends_with_its_socket_while_it_decodes(worker: Worker) -> None:
    worker.send(generate(1, length=3, max_tokens=2000))
    next(worker.outputs())
    assert worker.close() == 0


def test_a_worker_ends_with_its_socket_while_it_loads(started: Worker, tiny_model: Path) -> None:
    started.send(load(tiny_model))
    assert started.close() == 0


def test_a_worker_that_is_sent_garbage_ends(started: Worker) -> None:
    started._sock.sendall(b"\x02\x00\x00\x00hi")
    assert started.report() is None
    assert started.close() == 0


def test_signals_of_the_terminal_do_not_reach_a_worker(worker: Worker) -> None:
    assert worker.process.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.process.pid, number)
    worker.send(generate(1, length=4))
    assert worker.answer(1)[1].finish == "length"
