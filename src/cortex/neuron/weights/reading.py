"""Reads parameters from a checkpoint: the rows and columns that their pieces name, and no byte besides.

A parameter can be read whole or some rows at a time. Knows neither models nor modules.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.dequant import dequantize, scale_blocks
from cortex.neuron.weights.layout import BLOCKS, Scales, TensorInfo
from cortex.neuron.weights.source import Piece, Source

CHUNK: Final = 2**19
"""Elements that are dequantised at a time: few enough for the caches, enough to hide some thirty calls."""


class Stored:
    """The bytes of a checkpoint's tensors, not copied; nobody writes to them. For any number of threads."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, Tensor] = {}
        self._lock = threading.Lock()

    def tensor(self, name: str) -> TensorInfo:
        return self._checkpoint.tensors[name]

    def rows(self, tensor: TensorInfo, start: int, stop: int) -> Tensor:
        """uint8 [rows, bytes of a row]. Raises LoadFailed if the file cannot be read any more."""
        begin = tensor.offset + start * tensor.row_bytes
        end = tensor.offset + stop * tensor.row_bytes
        return self._file(tensor.file)[begin:end].view(stop - start, tensor.row_bytes)

    def read_ahead(self, tensor: TensorInfo, start: int, stop: int) -> None:
        self._checkpoint.read_ahead(tensor.name, start, stop)

    def _file(self, file: Path) -> Tensor:
        with self._lock:
            if file not in self._files:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # torch warns that the memory is read-only
                    self._files[file] = torch.frombuffer(self._checkpoint.data(file), dtype=torch.uint8)
            return self._files[file]


class Parameter:
    """What a parameter is made of. Slicing reads the rows, in the parameter's own dtype.

    `count` is told of the bytes as they are read; it may raise to stop the reading.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        source: Source,
        stored: Stored,
        count: Callable[[int], None],
    ) -> None:
        self.shape = shape
        self._dtype = dtype
        self._source = source
        self._stored = stored
        self._count = count

    @property
    def nbytes(self) -> int:
        """Bytes of the parameter itself."""
        return int(torch.Size(self.shape).numel()) * self._dtype.itemsize

    def __getitem__(self, rows: slice) -> Tensor:
        start, stop, _ = rows.indices(self.shape[0])
        if len(self._source) == 1 and (read := self._plainly(start, stop)) is not None:
            return read
        read = torch.empty((stop - start, *self.shape[1:]), dtype=self._dtype, device="cpu")
        at = 0
        for piece in self._source:
            tensor = self._stored.tensor(piece.tensor)
            height = row_count(piece, tensor)
            first, last = max(start - at, 0), min(stop - at, height)
            if first < last:
                self._piece(piece, tensor, first, last, read[at + first - start : at + last - start])
            at += height
        return read

    def read_ahead(self) -> None:
        for piece in self._source:
            tensor = self._stored.tensor(piece.tensor)
            stop = piece.start + row_count(piece, tensor)
            self._stored.read_ahead(tensor, piece.start, stop)
            if tensor.scales is not None:
                lines = tensor.scales.lines(piece.start, stop)
                self._stored.read_ahead(tensor.scales.tensor, lines.start, lines.stop)

    def _plainly(self, start: int, stop: int) -> Tensor | None:
        """The rows as they come, if nothing has to be done to them and they are few."""
        (piece,) = self._source
        if self._dtype != torch.float32 or len(self.shape) != 2 or piece.pairs or piece.change:
            return None
        if (stop - start) * self.shape[1] > CHUNK:
            return None
        tensor = self._stored.tensor(piece.tensor)
        numbers = self._numbers(piece, tensor, range(start, stop))
        # What is fp32 in the file is the file: whoever keeps it, or writes to it as packing does that bounds
        # weights in place, needs memory of its own.
        return numbers.clone() if tensor.dtype == "F32" else numbers

    def _piece(self, piece: Piece, tensor: TensorInfo, first: int, last: int, target: Tensor) -> None:
        """Rows [first, last) of what the piece makes, which is in another order than its tensor's rows."""
        for rows, part in _stored(piece.pairs, first, last, target):
            self._rows(piece, tensor, rows, part)
        if piece.change == "one_plus":
            target.add_(1)
        elif piece.change == "minus_exp":
            target.exp_().neg_()

    def _rows(self, piece: Piece, tensor: TensorInfo, rows: range, target: Tensor) -> None:
        step = max(1, CHUNK // max(1, tensor.columns))
        for first in range(0, len(rows), step):
            some = rows[first : first + step]
            part = target[first : first + len(some)]
            numbers = self._numbers(piece, tensor, some)
            part.copy_(numbers.view(part.shape) if part.dim() == 1 else numbers)

    def _numbers(self, piece: Piece, tensor: TensorInfo, rows: range) -> Tensor:
        """fp32 [rows, columns] of a piece, as they are stored."""
        low, high = _run_of_blocks(piece, tensor)
        per_block, block_bytes = BLOCKS[tensor.dtype]
        first, last = piece.start + rows.start, piece.start + rows.stop
        raw = self._stored.rows(tensor, first, last)[:, low * block_bytes : high * block_bytes]
        self._count(_bytes_up_to(rows.stop, piece, tensor) - _bytes_up_to(rows.start, piece, tensor))
        numbers = dequantize(raw, tensor.dtype)
        if tensor.scales is not None:  # then a block is a number
            scales, columns = tensor.scales, tensor.scales.columns
            scale_blocks(numbers, self._scales(scales, first, last, low, high), columns, low % columns)
        if piece.columns is None:
            return numbers
        start, stop = piece.columns
        return numbers[:, start - low * per_block : stop - low * per_block]

    def _scales(self, scales: Scales, first: int, last: int, low: int, high: int) -> Tensor:
        """fp32 [rows, blocks] for rows [first, last) and columns [low, high); one row if it does for all."""
        lines, blocks = scales.lines(first, last), scales.blocks(low, high)
        size = BLOCKS[scales.tensor.dtype][1]
        raw = self._stored.rows(scales.tensor, lines.start, lines.stop)
        found = dequantize(raw[:, blocks.start * size : blocks.stop * size], scales.tensor.dtype)
        if len(lines) < 2:
            return found
        return found.index_select(0, scales.line(torch.arange(first, last)) - lines.start)


class Parameters(Mapping[str, Tensor]):
    """The parameters of one module, read when they are asked for; `rows` gives them row by row."""

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = parameters

    def __getitem__(self, name: str) -> Tensor:
        return self._parameters[name][:]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def rows(self, name: str) -> Parameter:
        return self._parameters[name]


def row_count(piece: Piece, tensor: TensorInfo) -> int:
    return (tensor.rows if piece.stop is None else piece.stop) - piece.start


def stored_bytes(piece: Piece, tensor: TensorInfo) -> int:
    """Bytes that reading a piece takes, those of its scales too."""
    return _bytes_up_to(row_count(piece, tensor), piece, tensor)


def _bytes_up_to(row: int, piece: Piece, tensor: TensorInfo) -> int:
    """Of the rows of a piece before this one. A line of scales counts with the first row that needs it, so
    that in whichever runs the rows are read the sum is the same."""
    low, high = _run_of_blocks(piece, tensor)
    nbytes = row * (high - low) * BLOCKS[tensor.dtype][1]
    if tensor.scales is not None:
        lines = tensor.scales.lines(piece.start, piece.start + row)
        blocks = tensor.scales.blocks(low, high)
        nbytes += len(lines) * len(blocks) * BLOCKS[tensor.scales.tensor.dtype][1]
    return nbytes


def _run_of_blocks(piece: Piece, tensor: TensorInfo) -> tuple[int, int]:
    """The smallest run of a row's blocks that covers the columns of a piece."""
    per_block = BLOCKS[tensor.dtype][0]
    start, stop = piece.columns or (0, tensor.columns)
    return start // per_block, -(-stop // per_block)


def _stored(pairs: int, first: int, last: int, target: Tensor) -> Iterator[tuple[range, Tensor]]:
    """Runs of a piece's stored rows, and where of rows [first, last) of what it makes each belongs.

    Of a head whose rotary halves become neighbours, the first half makes the even rows, the second the odd.
    """
    if not pairs:
        yield range(first, last), target
        return
    half = pairs // 2
    for head in range(first // pairs * pairs, last, pairs):
        low, high = max(first - head, 0), min(last - head, pairs)
        for odd in (0, 1):
            at = low + (low + odd) % 2
            rows = range(head + odd * half + at // 2, head + odd * half + (high - odd + 1) // 2)
            if rows:
                yield rows, target[head + at - first : head + high - first : 2]
