"""A rank reads its own bytes and no others, and holds no more on the way than one tensor of its size.

Run as a program this loads a rank's share of a synthetic hybrid checkpoint and prints as JSON what that read
and took: `FILE RANK exact|naive THREADS`. Before an exact load pages that hold nothing of the rank's share
are made inaccessible: touching one ends the process.
"""

from __future__ import annotations

import ctypes
import json
import math
import mmap
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from cortex.neuron.weights import reading
from cortex.neuron.weights.checkpoint import Checkpoint
from cortex.neuron.weights.loader import load
from cortex.neuron.weights.reading import Stored
from cortex.neuron.weights.safetensors import read_header
from cortex.neuron.weights.source import Piece, Source, whole

WORLD = 2
KERNEL = 4
PAGE = mmap.PAGESIZE


class Sizes(NamedTuple):
    layers: int
    hidden: int
    keys: int
    values: int
    experts: int
    inner: int
    vocab: int


SMALL = Sizes(2, 1024, 512, 4096, 4, 512, 16384)
LARGE = Sizes(5, 2048, 1024, 4096, 32, 512, 98304)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """A layer has a fused projection and convolution of [Q | K | V], an output projection and experts.

    The largest tensor is the last, when nearly all of the shard is there.
    """
    fused = 2 * sizes.keys + sizes.values
    found: dict[str, tuple[int, ...]] = {"norm": (sizes.hidden,)}
    for layer in range(sizes.layers):
        found |= {
            f"{layer}.in_proj_qkv": (fused, sizes.hidden),
            f"{layer}.conv1d": (fused, 1, KERNEL),
            f"{layer}.out_proj": (sizes.hidden, sizes.values),
            f"{layer}.gate_up": (sizes.experts, 2 * sizes.inner, sizes.hidden),
            f"{layer}.down": (sizes.experts, sizes.hidden, sizes.inner),
            f"{layer}.norm": (sizes.hidden,),
        }
    found["embed"] = (sizes.vocab, sizes.hidden)
    return found


def write(path: Path, sizes: Sizes) -> None:
    """BF16 numbers from a short random run; every tensor of a page or more begins at a page."""
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes(sizes).items():
        nbytes = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": (end, end + nbytes)}
        end += -(-nbytes // PAGE) * PAGE
    text = json.dumps(header)
    text += " " * (-(8 + len(text)) % PAGE)
    numbers = torch.randn(2**20 - 3, generator=torch.Generator().manual_seed(1)).bfloat16()
    run = numbers.view(torch.uint8).numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text.encode())
        while end > 0:
            end -= file.write(run[:end])


def sources(sizes: Sizes, rank: int) -> dict[str, Source]:
    """Of a rank: its part of each region, of the columns, of the experts and of the vocabulary."""

    def part(size: int, start: int = 0) -> tuple[int, int]:
        return start + size * rank // WORLD, start + size * (rank + 1) // WORLD

    regions = (part(sizes.keys), part(sizes.keys, sizes.keys), part(sizes.values, 2 * sizes.keys))
    found: dict[str, Source] = {"norm": whole("norm")}
    for layer in range(sizes.layers):
        for name in (f"{layer}.in_proj_qkv", f"{layer}.conv1d"):
            found[name] = tuple(Piece(name, *region) for region in regions)
        found[f"{layer}.out_proj"] = (Piece(f"{layer}.out_proj", columns=part(sizes.values)),)
        for name, rows in ((f"{layer}.gate_up", 2 * sizes.inner), (f"{layer}.down", sizes.hidden)):
            found[name] = (Piece(name, *part(sizes.experts * rows)),)
        found[f"{layer}.norm"] = whole(f"{layer}.norm")
    found["embed"] = (Piece("embed", *part(sizes.vocab)),)
    return found


class Keeper(nn.Module):
    """Copies what it is filled with, as to a device, and keeps only the copy."""

    def __init__(self, meter: Meter, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._meter = meter
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float16, device="meta"), False)
        self.kept = torch.empty(0)

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.kept = tensors["weight"].clone()
        self._meter.look()


class Meter:
    """Bytes that were converted, and the most anonymous memory that was seen."""

    def __init__(self) -> None:
        self.read = 0
        self.base = self.peak = anonymous()

    def dequantize(self, raw: Tensor, dtype: str) -> Tensor:
        numbers = plain_dequantize(raw, dtype)
        self.read += raw.numel()
        self.look()
        return numbers

    def look(self) -> None:
        self.peak = max(self.peak, anonymous())


plain_dequantize = reading.dequantize


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def shape_of(source: Source, checkpoint: Checkpoint) -> tuple[int, ...]:
    rows = sum(reading.row_count(piece, checkpoint.tensors[piece.tensor]) for piece in source)
    tensor = checkpoint.tensors[source[0].tensor]
    if len(tensor.shape) == 1:
        return (rows,)
    start, stop = source[0].columns or (0, tensor.columns)
    return rows, stop - start


def measure(path: Path, sizes: Sizes, rank: int, way: str, threads: int) -> dict[str, Any]:
    """What loading a rank takes; `sample` are numbers of every parameter, to compare."""
    checkpoint = Checkpoint("safetensors", path, "hybrid", read_header(path))
    wanted = sources(sizes, rank)
    meter = Meter()
    tree = nn.ModuleDict()
    for name, source in wanted.items():
        tree[name.replace(".", "_")] = Keeper(meter, shape_of(source, checkpoint))
    if way == "exact":
        by_name = {f"{name.replace('.', '_')}.weight": source for name, source in wanted.items()}
        reading.dequantize = meter.dequantize
        try:
            load(tree, by_name, checkpoint, lambda done, total: None, threads=threads)
        finally:
            reading.dequantize = plain_dequantize
    else:
        for name, source in wanted.items():
            taken = naive(source, checkpoint, meter)
            tree[name.replace(".", "_")].kept = taken
    kept = [keeper.kept for keeper in tree.values()]
    return {
        "read": meter.read,
        "peak": meter.peak - meter.base,
        "shard": sum(tensor.nbytes for tensor in kept),
        "largest": max(tensor.nbytes for tensor in kept),
        "sample": [tensor.flatten()[:: max(1, tensor.numel() // 97)].tolist() for tensor in kept],
    }


def naive(source: Source, checkpoint: Checkpoint, meter: Meter) -> Tensor:
    """The whole tensor first, and then the rank's part of it."""
    tensor = checkpoint.tensors[source[0].tensor]
    raw = Stored(checkpoint).rows(tensor, 0, tensor.rows)
    full = raw.clone().view(torch.bfloat16).half()
    meter.read += raw.numel()
    meter.look()
    parts = [full[slice(piece.start, piece.stop)][:, slice(*(piece.columns or (None,)))] for piece in source]
    taken = torch.cat(parts).clone().squeeze(-1)
    meter.look()
    return taken


def forbid(path: Path, sizes: Sizes, rank: int) -> None:
    """Make the pages of later mappings of the file that hold nothing of the rank's share inaccessible."""
    original = Checkpoint.data

    def guarded(checkpoint: Checkpoint, file: Path) -> memoryview:
        data = original(checkpoint, file)
        address = torch.frombuffer(data, dtype=torch.uint8).data_ptr()
        libc = ctypes.CDLL(None, use_errno=True)
        for start, stop in foreign(checkpoint, sources(sizes, rank)):
            assert libc.mprotect(ctypes.c_void_p(address + start), ctypes.c_size_t(stop - start), 0) == 0
        return data

    Checkpoint.data = guarded  # type: ignore[method-assign]


def foreign(checkpoint: Checkpoint, wanted: dict[str, Source]) -> Iterator[tuple[int, int]]:
    """Whole pages between what is wanted. Of columns, those of the first hundred rows of a tensor."""
    taken = []
    for source in wanted.values():
        for piece in source:
            tensor = checkpoint.tensors[piece.tensor]
            rows = reading.row_count(piece, tensor)
            at = tensor.offset + piece.start * tensor.row_bytes
            if piece.columns is None:
                taken.append((at, at + rows * tensor.row_bytes))
                continue
            for row in range(100):
                begin = at + row * tensor.row_bytes
                taken.append((begin + 2 * piece.columns[0], begin + 2 * piece.columns[1]))
            taken.append((at + 100 * tensor.row_bytes, at + rows * tensor.row_bytes))
    end = min(tensor.offset for tensor in checkpoint.tensors.values())
    for start, stop in sorted(taken):
        if start // PAGE > -(-end // PAGE):
            yield -(-end // PAGE) * PAGE, start // PAGE * PAGE
        end = max(end, stop)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("small") / "model.safetensors"
    write(path, SMALL)
    return path


def measured(path: Path, rank: int, way: str, threads: int = 1) -> dict[str, Any]:
    """In a process of its own, so that nothing else is in its memory."""
    program = [sys.executable, __file__, str(path), str(rank), way, str(threads)]
    ended = subprocess.run(program, capture_output=True, check=False, text=True)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


def share(path: Path) -> tuple[int, int]:
    """Bytes of one of two ranks' shares, and of what both have whole."""
    tensors = read_header(path)
    replicated = sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith("norm"))
    return (sum(tensor.nbytes for tensor in tensors.values()) - replicated) // 2, replicated


def check(exact: dict[str, Any], naive: dict[str, Any], path: Path, spare: int = 0) -> None:
    own, replicated = share(path)
    assert own < exact["read"] <= 1.02 * own + replicated
    bound = 1.1 * exact["largest"] + spare
    assert exact["peak"] - exact["shard"] <= bound
    assert exact["sample"] == naive["sample"]
    assert naive["read"] > 1.02 * own + replicated
    assert naive["peak"] - naive["shard"] > bound


@pytest.mark.slow
def test_a_rank_reads_its_share_and_touches_no_page_besides(small: Path) -> None:
    exact = measured(small, 1, "exact")
    check(exact, measured(small, 1, "naive"), small, spare=2**23)  # some chunks


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_rank_of_a_large_checkpoint_reads_and_takes_what_it_must(tmp_path: Path, threads: int) -> None:
    path = tmp_path / "model.safetensors"
    write(path, LARGE)
    assert path.stat().st_size > 1.5e9
    for rank in range(WORLD):
        exact = measured(path, rank, "exact", threads)
        check(exact, measured(path, rank, "naive"), path)
    path.unlink()


def main() -> None:
    path, rank, way, threads = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    sizes = LARGE if path.stat().st_size > 2**30 else SMALL
    torch.set_num_threads(1)
    if way == "exact":
        forbid(path, sizes, rank)
    print(json.dumps(measure(path, sizes, rank, way, threads)))  # noqa: T201


if __name__ == "__main__":
    main()
