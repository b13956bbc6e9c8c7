from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Mapping
from pathlib import Path

import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize as reference
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor, nn

from cortex.neuron.weights import loader
from cortex.neuron.weights.checkpoint import Checkpoint, open_checkpoint
from cortex.neuron.weights.loader import load
from cortex.neuron.weights.reading import CHUNK, Parameter, Stored, row_count, stored_bytes
from cortex.neuron.weights.source import Piece, Source, whole
from cortex.wire.errors import LoadFailed

RNG = numpy.random.default_rng(3)
UPPER = RNG.standard_normal((48, 64), dtype=numpy.float32)
LOWER = quantize(RNG.standard_normal((16, 64), dtype=numpy.float32), GGMLQuantizationType.Q8_0)
LOWER_NUMBERS = torch.from_numpy(reference(LOWER, GGMLQuantizationType.Q8_0))
VECTOR = RNG.standard_normal(48, dtype=numpy.float32)
STACKED = RNG.standard_normal((4, 6, 64), dtype=numpy.float32)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("loader") / "model.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_tensor("upper", UPPER)
    writer.add_tensor("lower", LOWER, raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("vector", VECTOR)
    writer.add_tensor("stacked", STACKED)
    writer.add_tensor("long", numpy.ones((3, CHUNK), dtype=numpy.float16))
    writer.add_tensor("odd", numpy.zeros((4, 256), dtype=numpy.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_checkpoint(path)


class Taker(nn.Module):
    """Keeps what it is given, and counts how often."""

    def __init__(self, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.given: list[Mapping[str, Tensor]] = []
        for name, shape in shapes.items():
            empty = torch.empty(shape, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(empty, requires_grad=False))

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        self.given.append(dict(tensors))


def filled(checkpoint: Checkpoint, taker: Taker, **sources: Source) -> Mapping[str, Tensor]:
    load(taker, sources, checkpoint, lambda done, total: None)
    (given,) = taker.given
    return given


def test_row_ranges_of_several_tensors_are_joined_in_order(checkpoint: Checkpoint) -> None:
    source = (Piece("lower", 4, 9), Piece("upper"), Piece("lower", 15))
    given = filled(checkpoint, Taker(w=(54, 64)), w=source)
    expected = torch.cat((LOWER_NUMBERS[4:9], torch.from_numpy(UPPER), LOWER_NUMBERS[15:]))
    assert torch.equal(given["w"], expected)


def test_two_shards_are_the_halves_of_the_whole(checkpoint: Checkpoint) -> None:
    halves = [
        filled(checkpoint, Taker(w=(32, 64)), w=(Piece("upper", *upper), Piece("lower", *lower)))["w"]
        for upper, lower in [((0, 24), (0, 8)), ((24, 48), (8, 16))]
    ]
    assert torch.equal(torch.cat((halves[0][:24], halves[1][:24])), torch.from_numpy(UPPER))
    assert torch.equal(torch.cat((halves[0][24:], halves[1][24:])), LOWER_NUMBERS)


def test_columns_are_cut_from_every_row_and_joined_with_whole_ones(checkpoint: Checkpoint) -> None:
    """Of quantized rows too, whose blocks need not end where the columns do."""
    source = (Piece("lower", 4, 9, columns=(20, 50)), Piece("upper", columns=(34, 64)))
    given = filled(checkpoint, Taker(w=(53, 30)), w=source)
    assert torch.equal(given["w"], torch.cat((LOWER_NUMBERS[4:9, 20:50], torch.from_numpy(UPPER[:, 34:]))))


def test_columns_of_two_ranks_are_the_whole_side_by_side(checkpoint: Checkpoint) -> None:
    halves = [
        filled(checkpoint, Taker(w=(48, 32)), w=(Piece("upper", columns=columns),))["w"]
        for columns in [(0, 32), (32, 64)]
    ]
    assert torch.equal(torch.cat(halves, 1), torch.from_numpy(UPPER))


def test_columns_of_long_rows_are_cut_chunk_by_chunk(checkpoint: Checkpoint) -> None:
    told: list[tuple[int, int]] = []
    taker = Taker(w=(3, 5))
    source = (Piece("long", columns=(CHUNK - 5, CHUNK)),)
    load(taker, {"w": source}, checkpoint, lambda done, total: told.append((done, total)))
    assert torch.equal(taker.given[0]["w"], torch.ones(3, 5))
    assert told[-1] == (3 * 5 * 2, 3 * 5 * 2)


def test_rotary_halves_become_pairs_within_each_head(checkpoint: Checkpoint) -> None:
    given = filled(
        checkpoint, Taker(w=(48, 64), b=(48,)), w=(Piece("upper", pairs=12),), b=(Piece("vector", pairs=12),)
    )
    order = [head + part for head in range(0, 48, 12) for i in range(6) for part in (i, i + 6)]
    assert torch.equal(given["w"], torch.from_numpy(UPPER[order]))
    assert torch.equal(given["b"], torch.from_numpy(VECTOR[order]))


SOURCES: dict[str, Source] = {
    "whole": whole("upper"),
    "pairs": (Piece("upper", pairs=12),),
    "joined": (Piece("lower", 3, 7), Piece("upper", 12, 36, pairs=8), Piece("lower", 8, change="one_plus")),
}


@pytest.mark.parametrize("name", SOURCES)
def test_any_rows_of_a_parameter_are_those_of_the_whole(checkpoint: Checkpoint, name: str) -> None:
    read: list[int] = []
    source = SOURCES[name]
    height = sum(row_count(piece, checkpoint.tensors[piece.tensor]) for piece in source)
    parameter = Parameter((height, 64), torch.float32, source, Stored(checkpoint), read.append)
    everything = parameter[:]
    for start in range(0, height, 5):
        for stop in range(start, height + 1, 3):
            assert torch.equal(parameter[start:stop], everything[start:stop])
    read.clear()
    for start in range(height):
        parameter[start : start + 1]
    assert sum(read) == sum(stored_bytes(piece, checkpoint.tensors[piece.tensor]) for piece in source)


def test_rows_of_a_stack_of_matrices_are_counted_through(checkpoint: Checkpoint) -> None:
    given = filled(checkpoint, Taker(w=(7, 64)), w=(Piece("stacked", 5, 12),))
    assert torch.equal(given["w"], torch.from_numpy(STACKED.reshape(24, 64)[5:12]))


def test_numbers_are_changed_as_their_piece_says_and_no_others(checkpoint: Checkpoint) -> None:
    source = (Piece("vector", 0, 9, change="one_plus"), Piece("vector", 9, 30), Piece("vector", 30))
    given = filled(checkpoint, Taker(a=(48,), b=(48,)), a=source, b=(Piece("vector", change="minus_exp"),))
    vector = torch.from_numpy(VECTOR)
    assert torch.equal(given["a"], torch.cat((1 + vector[:9], vector[9:])))
    assert torch.equal(given["b"], -vector.exp())


def test_parameters_are_handed_over_in_their_own_dtype(checkpoint: Checkpoint) -> None:
    given = filled(checkpoint, Taker(dtype=torch.float16, w=(16, 64)), w=whole("lower"))
    assert torch.equal(given["w"], LOWER_NUMBERS.half())


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
@pytest.mark.parametrize("columns", [None, (0, 32)])
def test_what_is_handed_over_is_no_part_of_the_file(
    checkpoint: Checkpoint, columns: tuple[int, int] | None
) -> None:
    """Which would change with it, and which nobody may write to."""
    width = 64 if columns is None else 32
    given = filled(checkpoint, Taker(w=(48, width)), w=(Piece("upper", columns=columns),))
    mapped = torch.frombuffer(checkpoint.data(checkpoint.path), dtype=torch.uint8)
    assert not 0 <= given["w"].data_ptr() - mapped.data_ptr() < mapped.numel()
    given["w"].add_(1)


def test_progress_counts_the_bytes_that_are_read_up_to_all_of_them(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "TOLD_BYTES", CHUNK * 2)
    told: list[tuple[int, int]] = []
    sources = {"w": whole("long"), "b": (Piece("vector", 0, 10),)}
    taker = Taker(w=(3, CHUNK), b=(10,))
    load(taker, sources, checkpoint, lambda done, total: told.append((done, total)))
    everything = 3 * CHUNK * 2 + 40
    assert [done for done, _ in told] == [0, CHUNK * 2, CHUNK * 4, CHUNK * 6, everything]
    assert {total for _, total in told} == {everything}


def test_modules_are_filled_in_file_order_whatever_the_tree(checkpoint: Checkpoint) -> None:
    filled_: list[str] = []

    class Named(Taker):
        def fill(self, tensors: Mapping[str, Tensor]) -> None:
            filled_.append(str(next(iter(tensors.values())).dim()))

    tree = nn.ModuleDict({"a": Named(w=(48,)), "b": Named(w=(48, 64))})
    load(tree, {"a.w": whole("vector"), "b.w": whole("upper")}, checkpoint, lambda done, total: None)
    assert filled_ == ["2", "1"]


@pytest.mark.parametrize(
    ("shape", "source", "said"),
    [
        ((48, 64), whole("missing"), "lacks tensor missing"),
        ((49, 64), whole("upper"), r"asks for \[49, 64\], the file has upper \[48, 64\]"),
        ((48, 32), whole("upper"), r"asks for \[48, 32\], the file has upper \[48, 64\]"),
        ((48, 64), (Piece("upper", 0, 49),), "tensor upper has 48 rows; rows 0 to 49 are needed"),
        ((48, 64), (Piece("upper", pairs=10),), "tensor upper has 48 rows"),
        ((48, 65), (Piece("upper", columns=(0, 65)),), r"has 64 columns; columns \(0, 65\) are needed"),
        ((48, 8), (Piece("upper", columns=(40, 32)),), r"has 64 columns; columns \(40, 32\) are needed"),
        ((48, 8), (Piece("upper", columns=(-8, 0)),), r"has 64 columns; columns \(-8, 0\) are needed"),
        ((48, 64), (Piece("upper", columns=(0, 32)),), r"asks for \[48, 64\]"),
        (
            (64, 32),
            (Piece("upper", columns=(0, 32)), Piece("lower", columns=(0, 31))),
            r"asks for \[64, 32\]",
        ),
        ((16, 64), (Piece("upper", 0, 16, of=16),), r"\[48, 64\], which is 48 rows; .* asks for 16"),
        ((48, 8), (Piece("upper", columns=(0, 8), of=16),), r"which is 64 columns; .* asks for 16"),
        ((48,), whole("upper"), r"asks for \[48\], the file has upper \[48, 64\]"),
        ((48, 1), whole("vector"), r"tensor vector has the shape \[48\]"),
        ((4, 256), whole("odd"), "tensor odd is stored as I8"),
    ],
)
def test_what_does_not_fit_is_named_before_anything_is_read(
    checkpoint: Checkpoint, shape: tuple[int, ...], source: Source, said: str
) -> None:
    told: list[int] = []
    with pytest.raises(LoadFailed, match=said):
        load(Taker(w=shape), {"w": source}, checkpoint, lambda done, total: told.append(done))
    assert told == []


class Abort(Exception):
    pass


def test_an_abort_stops_modules_that_are_being_filled_and_frees_everything(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that reads on and on ends at its next chunk, no other is begun, and nothing holds the tree."""
    monkeypatch.setattr(loader, "TOLD_BYTES", 1)
    ended = threading.Event()

    class Endless(Taker):
        def fill(self, tensors: Mapping[str, Tensor]) -> None:
            try:
                while True:
                    tensors["w"]
            finally:
                ended.set()

    def abort(done: int, total: int) -> None:
        if done:
            raise Abort

    tree = nn.ModuleDict({"a": Endless(w=(48, 64)), "b": Taker(w=(48,))})
    with pytest.raises(Abort):
        load(tree, {"a.w": whole("upper"), "b.w": whole("vector")}, checkpoint, abort)
    assert ended.is_set()
    assert tree["b"].given == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("fill")]
    watched = weakref.ref(tree)
    del tree
    gc.collect()
    assert watched() is None


def test_modules_are_filled_side_by_side_within_the_bytes_of_the_largest(checkpoint: Checkpoint) -> None:
    """Two small ones together take as much on the way as the large one, which is alone."""
    under_way: list[str] = []
    seen: set[frozenset[str]] = set()
    together = threading.Barrier(2, timeout=10)

    class Watched(Taker):
        def fill(self, tensors: Mapping[str, Tensor]) -> None:
            (size,) = (tensor.shape[0] for tensor in tensors.values())
            under_way.append(str(size))
            if size == 24:
                together.wait()
            seen.add(frozenset(under_way))
            if size == 24:
                together.wait()
            under_way.remove(str(size))

    tree = nn.ModuleDict({"a": Watched(w=(24, 64)), "b": Watched(w=(24, 64)), "c": Watched(w=(48, 64))})
    sources = {"a.w": (Piece("upper", 0, 24),), "b.w": (Piece("upper", 24),), "c.w": whole("upper")}
    load(tree, sources, checkpoint, lambda done, total: None, threads=3)
    assert seen == {frozenset({"24"}), frozenset({"48"})}


def test_a_tensor_that_does_not_fit_is_named_with_its_shard(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2, 3)}, tmp_path / "one.safetensors")
    save_file({"b": torch.ones(3, 3)}, tmp_path / "two.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with (
        open_checkpoint(tmp_path) as shards,
        pytest.raises(LoadFailed, match=r"two\.safetensors: .*b \[3, 3\]"),
    ):
        load(Taker(w=(4, 3)), {"w": whole("b")}, shards, lambda done, total: None)


def test_a_module_that_cannot_be_filled_fails_the_load(checkpoint: Checkpoint) -> None:
    class Full(Taker):
        def fill(self, tensors: Mapping[str, Tensor]) -> None:
            raise MemoryError

    with pytest.raises(MemoryError):
        load(Full(w=(48, 64)), {"w": whole("upper")}, checkpoint, lambda done, total: None)
