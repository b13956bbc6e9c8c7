"""Fills a model that was built on the meta device from a checkpoint, module by module, in a few threads.

Each thread reads and fills a module at a time; what all of them hold at once is bounded. Knows neither
architectures nor devices: modules place what they are given.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.layout import BLOCKS, TensorInfo
from cortex.neuron.weights.reading import Parameter, Parameters, Stored, row_count, stored_bytes
from cortex.neuron.weights.scaling import check_readable
from cortex.neuron.weights.source import Piece, Source
from cortex.wire.errors import LoadFailed

TOLD_BYTES: Final = 2**22
"""Bytes that are read between two reports; at each of them a thread waits for another."""

Report = Callable[[int, int], None]
"""Told bytes read and bytes in all, often; may raise to abort the load."""


class Fillable(Protocol):
    """A module with parameters of its own, on the meta device until it is filled.

    It may have an attribute `staged`: the bytes that filling it takes on the way, besides what it then
    keeps. Without one they are taken to be those of its parameters.
    """

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take all of the module's parameters, host tensors by name, once.

        Each is read when it is looked up, and not kept; `nn.filling.rows` reads one in part.
        """


class _Job(NamedTuple):
    """All parameters of one module, and what filling it takes from the file and in memory."""

    module: Fillable
    parameters: Mapping[str, Parameter]
    place: tuple[str, int]
    nbytes: int
    staged: int

    def run(self) -> None:
        self.module.fill(Parameters(self.parameters))


def load(
    model: nn.Module,
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    report: Report,
    *,
    threads: int = 1,
) -> None:
    """Fill `model`, whose parameters `sources` names as `named_parameters` does, in file order.

    `threads` modules are filled at a time, fewer where they would take more on the way than the largest
    parameter has bytes. Everything is checked before anything is read. Raises LoadFailed that names file
    and tensor; what `report` raises passes through, once the threads have stopped, and leaves nothing.
    """
    filling = _Filling(threads, report)
    stored = Stored(checkpoint)
    jobs = _jobs(
        model,
        sources,
        checkpoint,
        lambda source, parameter: Parameter(
            tuple(parameter.shape), parameter.dtype, source, stored, filling.count
        ),
    )
    filling.total = sum(job.nbytes for job in jobs)
    filling.most = max((one.nbytes for job in jobs for one in job.parameters.values()), default=0)
    try:
        filling.tell(0)
        for job in jobs:
            for parameter in job.parameters.values():
                parameter.read_ahead()
            filling.start(job)
        filling.finish()
    finally:
        filling.stop()


class _Filling:
    """The threads that fill, and the one that waits for them and reports."""

    def __init__(self, threads: int, report: Report) -> None:
        self.total = 0
        self.most = 0
        """Bytes that all jobs under way may take on the way."""
        self._report = report
        self._done = 0
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "fill", initializer=torch.set_num_threads, initargs=(1,))
        self._under_way: dict[Future[None], int] = {}
        self._events: queue.SimpleQueue[int | Future[None]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._untold = 0
        self._stopped = threading.Event()

    def start(self, job: _Job) -> None:
        """Once there is room. Raises what another job or the report raised."""
        while self._under_way and not self._has_room(job):
            self._next()
        started = self._pool.submit(job.run)
        self._under_way[started] = job.staged
        started.add_done_callback(self._events.put)

    def finish(self) -> None:
        while self._under_way:
            self._next()
        self.tell(self._untold)

    def stop(self) -> None:
        """The threads end at their next chunk."""
        self._stopped.set()
        self._pool.shutdown(cancel_futures=True)

    def count(self, nbytes: int) -> None:
        """Called by the threads for what they read."""
        if self._stopped.is_set():
            raise _Stopped
        with self._lock:
            self._untold += nbytes
            if self._untold < TOLD_BYTES:
                return
            told, self._untold = self._untold, 0
        self._events.put(told)

    def tell(self, nbytes: int) -> None:
        self._done += nbytes
        self._report(self._done, self.total)

    def _has_room(self, job: _Job) -> bool:
        staged = sum(self._under_way.values()) + job.staged
        return len(self._under_way) < self._threads and staged <= self.most

    def _next(self) -> None:
        event = self._events.get()
        if isinstance(event, int):
            self.tell(event)
        else:
            del self._under_way[event]
            event.result()


class _Stopped(Exception):
    """Ends the threads of a load that has failed."""


def _jobs(
    model: nn.Module,
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    parameter_of: Callable[[Source, nn.Parameter], Parameter],
) -> list[_Job]:
    jobs = []
    for prefix, module in model.named_modules():
        parameters = {}
        tensors: list[TensorInfo] = []
        nbytes = 0
        for name, parameter in module.named_parameters(recurse=False):
            source = sources[f"{prefix}.{name}" if prefix else name]
            found = [_check_piece(piece, checkpoint, parameter) for piece in source]
            _check_shape(parameter, source, found)
            tensors += found
            nbytes += sum(stored_bytes(piece, t) for piece, t in zip(source, found, strict=True))
            parameters[name] = parameter_of(source, parameter)
        if parameters:
            first = min(tensors, key=lambda tensor: (str(tensor.file), tensor.offset))
            staged = getattr(module, "staged", None)
            if staged is None:
                staged = sum(parameter.nbytes for parameter in parameters.values())
            place = (str(first.file), first.offset)
            jobs.append(_Job(cast(Fillable, module), parameters, place, nbytes, staged))
    return sorted(jobs, key=lambda job: job.place)


def _check_piece(piece: Piece, checkpoint: Checkpoint, parameter: nn.Parameter) -> TensorInfo:
    tensor = checkpoint.tensors.get(piece.tensor)
    if tensor is None:
        raise LoadFailed(f"{checkpoint.path} lacks tensor {piece.tensor}.")
    check_readable(tensor)
    where = f"{tensor.file}: tensor {tensor.name}"
    if len(tensor.shape) < parameter.dim() or (len(tensor.shape) == 1 and BLOCKS[tensor.dtype][0] != 1):
        raise LoadFailed(f"{where} has the shape {list(tensor.shape)} as {tensor.dtype}, which does not fit.")
    has = tensor.rows if piece.columns is None else tensor.columns
    if piece.of not in (None, has):
        what = "rows" if piece.columns is None else "columns"
        raise LoadFailed(
            f"{where} has the shape {list(tensor.shape)}, which is {has} {what}; the configuration asks for "
            f"{piece.of}."
        )
    stop = tensor.rows if piece.stop is None else piece.stop
    if not 0 <= piece.start <= stop <= tensor.rows or (piece.pairs and (stop - piece.start) % piece.pairs):
        raise LoadFailed(f"{where} has {tensor.rows} rows; rows {piece.start} to {stop} are needed.")
    if piece.columns is not None and not 0 <= piece.columns[0] <= piece.columns[1] <= tensor.columns:
        raise LoadFailed(f"{where} has {tensor.columns} columns; columns {piece.columns} are needed.")
    return tensor


def _check_shape(parameter: nn.Parameter, source: Source, tensors: list[TensorInfo]) -> None:
    rows = sum(row_count(piece, tensor) for piece, tensor in zip(source, tensors, strict=True))
    wanted = parameter.shape[1] if parameter.dim() > 1 else 1
    odd = [
        tensor
        for piece, tensor in zip(source, tensors, strict=True)
        if wanted != (tensor.columns if piece.columns is None else piece.columns[1] - piece.columns[0])
    ]
    if rows != parameter.shape[0] or odd:
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors)
        raise LoadFailed(
            f"{(odd or tensors)[0].file}: the configuration asks for {list(parameter.shape)}, "
            f"the file has {shapes}."
        )
