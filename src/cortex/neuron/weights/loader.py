"""Fills a model that was built on the meta device from a checkpoint, module by module.

Each parameter is joined on the host from the rows that its source names and handed over once.
Knows neither architectures nor devices: modules place what they are given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Final, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.dequant import dequantize
from cortex.neuron.weights.layout import BLOCKS, READABLE, TensorInfo
from cortex.neuron.weights.source import Piece, Source
from cortex.wire.errors import LoadFailed

CHUNK: Final = 2**19
"""Elements that are dequantised at a time: few enough for the caches, enough to hide the calls."""

Report = Callable[[int, int], None]
"""Told bytes read and bytes in all, often; may raise to abort the load."""


class Fillable(Protocol):
    """A module with parameters of its own, on the meta device until it is filled."""

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Take all of the module's parameters, host tensors by name, once."""


class _Job(NamedTuple):
    """All parameters of one module, with what they take from the file."""

    module: Fillable
    parameters: list[tuple[str, nn.Parameter, Source]]
    order: tuple[str, int]
    nbytes: int


def load(
    model: nn.Module,
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    report: Report,
    *,
    threads: int = 1,
) -> None:
    """Fill `model`, whose parameters `sources` names as `named_parameters` does, in file order.

    Reading and joining is one thread's work; `threads` others fill modules meanwhile, which in the
    packed form takes longer. Everything is checked before anything is read. Raises LoadFailed that
    names file and tensor; what `report` raises passes through at once and nothing is filled any more.
    """
    jobs = _jobs(model, sources, checkpoint)
    progress = _Progress(report, sum(job.nbytes for job in jobs))
    progress.add(0)
    pool = ThreadPoolExecutor(threads, "fill", initializer=torch.set_num_threads, initargs=(1,))
    filling: set[Future[None]] = set()
    try:
        for job in jobs:
            tensors = {name: _join(p, source, checkpoint, progress) for name, p, source in job.parameters}
            filling.add(pool.submit(job.module.fill, tensors))
            del tensors
            filling = _settled(filling, threads)  # so few joined parameters wait in memory
        _settled(filling, 0)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _settled(filling: set[Future[None]], most: int) -> set[Future[None]]:
    """Those still under way, once they are at most so many. Raises what failed."""
    while len(filling) > most:
        done, filling = wait(filling, return_when=FIRST_COMPLETED)
        for filled in done:
            filled.result()
    return filling


class _Progress:
    def __init__(self, report: Report, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def add(self, nbytes: int) -> None:
        self._done += nbytes
        self._report(self._done, self._total)


def _jobs(model: nn.Module, sources: Mapping[str, Source], checkpoint: Checkpoint) -> list[_Job]:
    jobs = []
    for prefix, module in model.named_modules():
        parameters = []
        tensors: list[TensorInfo] = []
        nbytes = 0
        for name, parameter in module.named_parameters(recurse=False):
            source = sources[f"{prefix}.{name}" if prefix else name]
            found = [_check_piece(piece, checkpoint, parameter) for piece in source]
            _check_shape(parameter, source, found)
            tensors += found
            nbytes += sum(_rows(piece, t) * t.row_bytes for piece, t in zip(source, found, strict=True))
            parameters.append((name, parameter, source))
        if parameters:
            first = min(tensors, key=lambda tensor: (str(tensor.file), tensor.offset))
            place = (str(first.file), first.offset)
            jobs.append(_Job(cast(Fillable, module), parameters, place, nbytes))
    return sorted(jobs, key=lambda job: job.order)


def _check_piece(piece: Piece, checkpoint: Checkpoint, parameter: nn.Parameter) -> TensorInfo:
    tensor = checkpoint.tensors.get(piece.tensor)
    if tensor is None:
        raise LoadFailed(f"{checkpoint.path} lacks tensor {piece.tensor}.")
    where = f"{tensor.file}: tensor {tensor.name}"
    if tensor.dtype not in READABLE:
        raise LoadFailed(f"{where} is stored as {tensor.dtype}; {', '.join(READABLE)} can be read.")
    if len(tensor.shape) < parameter.dim() or (len(tensor.shape) == 1 and BLOCKS[tensor.dtype][0] != 1):
        raise LoadFailed(f"{where} has the shape {list(tensor.shape)} as {tensor.dtype}, which does not fit.")
    stop = tensor.rows if piece.stop is None else piece.stop
    if not 0 <= piece.start <= stop <= tensor.rows or (piece.pairs and (stop - piece.start) % piece.pairs):
        raise LoadFailed(f"{where} has {tensor.rows} rows; rows {piece.start} to {stop} are needed.")
    if piece.columns is not None and not 0 <= piece.columns[0] <= piece.columns[1] <= tensor.columns:
        raise LoadFailed(f"{where} has {tensor.columns} columns; columns {piece.columns} are needed.")
    return tensor


def _check_shape(parameter: nn.Parameter, source: Source, tensors: list[TensorInfo]) -> None:
    rows = sum(_rows(piece, tensor) for piece, tensor in zip(source, tensors, strict=True))
    columns = {
        tensor.columns if piece.columns is None else piece.columns[1] - piece.columns[0]
        for piece, tensor in zip(source, tensors, strict=True)
    }
    wanted = parameter.shape[1] if parameter.dim() > 1 else 1
    if rows != parameter.shape[0] or columns != {wanted}:
        shapes = ", ".join(f"{tensor.name} {list(tensor.shape)}" for tensor in tensors)
        raise LoadFailed(
            f"{tensors[0].file}: the configuration asks for {list(parameter.shape)}, the file has {shapes}."
        )


def _rows(piece: Piece, tensor: TensorInfo) -> int:
    return (tensor.rows if piece.stop is None else piece.stop) - piece.start


def _join(parameter: nn.Parameter, source: Source, checkpoint: Checkpoint, progress: _Progress) -> Tensor:
    """The parameter on the host, in its own dtype."""
    joined = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
    at = 0
    for piece in source:
        tensor = checkpoint.tensors[piece.tensor]
        count = _rows(piece, tensor)
        target = joined[at : at + count]
        _read(piece, tensor, target, checkpoint, progress)
        if piece.pairs:
            _interleave(target, piece.pairs)
        if piece.change == "one_plus":
            target.add_(1)
        elif piece.change == "minus_exp":
            target.exp_().neg_()
        at += count
    return joined


def _read(
    piece: Piece, tensor: TensorInfo, target: Tensor, checkpoint: Checkpoint, progress: _Progress
) -> None:
    count = target.shape[0]
    step = max(1, CHUNK // max(1, tensor.columns))
    for first in range(0, count, step):
        last = min(count, first + step)
        raw = _bytes(checkpoint.rows(tensor.name, piece.start + first, piece.start + last))
        numbers = dequantize(raw.view(last - first, tensor.row_bytes), tensor.dtype)
        if piece.columns is not None:
            numbers = numbers[:, slice(*piece.columns)]
        target[first:last].copy_(numbers.view(target[first:last].shape) if target.dim() == 1 else numbers)
        progress.add(raw.numel())


def _bytes(view: memoryview) -> Tensor:
    """The mapped bytes as uint8, not copied; nobody writes to them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch warns that the memory is read-only
        return torch.frombuffer(view, dtype=torch.uint8)


def _interleave(rows: Tensor, head: int) -> None:
    """In place, of each `head` rows: the i-th and the i-th of the second half become neighbours."""
    halves = rows.reshape(-1, 2, head // 2, *rows.shape[1:])
    rows.copy_(halves.transpose(1, 2).reshape(rows.shape))
