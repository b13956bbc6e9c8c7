"""Headers that lie: whatever a file claims, opening it is a shape or our error, in little memory.

The files are sparse and look 8 GiB large, so that a claim which only the file's size bounds shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cortex.neuron.models.reading import read_shape
from cortex.neuron.models.shape import ModelShape
from cortex.neuron.weights.checkpoint import open_checkpoint
from cortex.neuron.weights.gguf import TYPES
from cortex.wire.errors import LoadFailed

APPARENT = 2**33
MOST_BYTES = 2**27
"""What opening may take at most; metadata arrays and JSON are bounded by it."""
HIDDEN, VOCAB, LAYERS, HEADS = 32, 2048, 2, 4
U32, F32, STRING, ARRAY = 4, 6, 8, 9


def opened(path: Path) -> ModelShape | None:
    """The shape, or None where it was refused as it should be. Anything else fails the test."""
    try:
        with open_checkpoint(path) as checkpoint:
            return read_shape(checkpoint)
    except LoadFailed as refused:
        assert str(path.parent) in refused.message
        return None


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


def shapes() -> dict[str, list[int]]:
    """Tensors of a llama in GGUF's names, outermost dimension first."""
    found = {"token_embd.weight": [VOCAB, HIDDEN], "output_norm.weight": [HIDDEN]}
    for layer in range(LAYERS):
        found |= {f"blk.{layer}.{name}.weight": [HIDDEN] for name in ("attn_norm", "ffn_norm")}
        found |= {f"blk.{layer}.attn_{name}.weight": [HIDDEN, HIDDEN] for name in ("q", "k", "v", "output")}
        found |= {f"blk.{layer}.ffn_{name}.weight": [HIDDEN, HIDDEN] for name in ("gate", "up", "down")}
    return found


class Writer:
    """Bytes of a GGUF header, with the place and form of every number in it that a reader must doubt."""

    def __init__(self) -> None:
        self.content = bytearray(b"GGUF")
        self.numbers: list[tuple[int, str]] = []

    def number(self, form: str, value: float) -> None:
        self.numbers.append((len(self.content), form))
        self.content += struct.pack(form, value)

    def text(self, value: str) -> None:
        self.number("<Q", len(value.encode()))
        self.content += value.encode()

    def pair(self, key: str, kind: int, form: str, value: Any) -> None:
        self.text(key)
        self.number("<I", kind)
        if kind == STRING:
            self.text(value)
        else:
            self.number(form, value)


def gguf_header() -> Writer:
    written = Writer()
    integers = {
        "llama.block_count": LAYERS,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": HIDDEN,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": HEADS,
        "llama.context_length": 128,
        "general.alignment": 32,
    }
    tensors = shapes()
    written.number("<I", 3)
    written.number("<Q", len(tensors))
    written.number("<Q", len(integers) + 3)
    written.pair("general.architecture", STRING, "", "llama")
    written.pair("llama.attention.layer_norm_rms_epsilon", F32, "<f", 1e-5)
    written.text("tokenizer.ggml.tokens")
    for form, value in (("<I", ARRAY), ("<I", STRING), ("<Q", VOCAB)):
        written.number(form, value)
    for token in range(VOCAB):
        written.text(f"a token of the vocabulary {token:05}")
    for key, value in integers.items():
        written.pair(key, U32, "<I", value)
    offset = 0
    for name, shape in tensors.items():
        written.text(name)
        written.number("<I", len(shape))
        for dimension in reversed(shape):
            written.number("<Q", dimension)
        written.number("<I", 0)
        written.number("<Q", offset)
        offset += 4 * HIDDEN * (shape[0] if len(shape) == 2 else 1)
    return written


def lies(form: str, chance: random.Random) -> list[bytes]:
    """Values that a number of a header might be changed to."""
    if form == "<f":
        return [struct.pack(form, value) for value in (0.0, -1.0, float("nan"), float("inf"))]
    top = 2 ** (8 * struct.calcsize(form))
    edges = [0, 1, 3, 255, 65535, 2**20, top // 2 - 1, top // 2, top - 1, top - 8, top // 256]
    edges += [chance.randrange(top) for _ in range(2)]
    return [struct.pack(form, value) for value in edges]


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Writer]:
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    written = gguf_header()
    assert len(written.content) > 2**16
    path.write_bytes(written.content)
    os.truncate(path, APPARENT)
    shape = opened(path)
    assert shape is not None
    assert (shape.layers, shape.vocab) == (LAYERS, VOCAB)
    return path, written


def test_a_gguf_file_that_ends_anywhere_in_its_first_64_kib_is_refused(
    tmp_path: Path, gguf: tuple[Path, Writer]
) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf[1].content)
    for length in range(2**16, -1, -64):
        os.truncate(path, length)
        with little_memory() if not length % 2**12 else contextlib.nullcontext():
            assert opened(path) is None


def changed(path: Path, at: int, lie: bytes) -> ModelShape | None:
    """What opening gives while some bytes are others."""
    with path.open("r+b", buffering=0) as file:
        truth = os.pread(file.fileno(), len(lie), at)
        os.pwrite(file.fileno(), lie, at)
        try:
            return opened(path)
        finally:
            os.pwrite(file.fileno(), truth, at)


def test_any_number_of_a_gguf_header_may_lie(gguf: tuple[Path, Writer]) -> None:
    """Counts, lengths, types, dimensions, offsets and values; of the vocabulary only some."""
    path, written = gguf
    chance = random.Random(5)
    vocabulary = slice(12, VOCAB, 100)
    numbers = [*written.numbers[:12], *written.numbers[vocabulary], *written.numbers[VOCAB + 12 :]]
    refused = 0
    for at, form in numbers:
        for lie in lies(form, chance):
            refused += changed(path, at, lie) is None
    assert refused > 8 * len(numbers)
    assert opened(path) is not None


def test_no_lie_of_a_gguf_header_costs_much_memory(gguf: tuple[Path, Writer]) -> None:
    path, written = gguf
    for at, form in (*written.numbers[:12], *written.numbers[-6:]):
        for value in (2**20, 2**21, 2**31 - 1, 2**62):
            if value < 2 ** (8 * struct.calcsize(form)) and form != "<f":
                with little_memory():
                    changed(path, at, struct.pack(form, value))


def safetensors_names() -> dict[str, list[int]]:
    layer = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    layer |= {"attn_output": "self_attn.o_proj", "attn_norm": "input_layernorm"}
    layer |= {"ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    layer |= {"ffn_down": "mlp.down_proj", "token_embd": "embed_tokens", "output_norm": "norm"}
    found = {"lm_head.weight": [VOCAB, HIDDEN]}
    for name, shape in shapes().items():
        for old, new in layer.items():
            name = name.replace(f"{old}.weight", f"{new}.weight")
        found["model." + name.replace("blk.", "layers.")] = shape
    return found


def write_shard(path: Path, tensors: dict[str, list[int]], padding: int = 0) -> bytes:
    """A sparse shard of zeros with a long header; returns it."""
    header: dict[str, Any] = {"__metadata__": {"padding": "x" * padding}} if padding else {}
    offset = 0
    for name, shape in tensors.items():
        nbytes = 2 * shape[0] * (shape[1] if len(shape) == 2 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    encoded = json.dumps(header).encode()
    content = struct.pack("<Q", len(encoded)) + encoded
    path.write_bytes(content)
    os.truncate(path, APPARENT)
    return content


CONFIG = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
INDEX = "model.safetensors.index.json"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    tensors = list(safetensors_names().items())
    folder = tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    halves = {"one.safetensors": dict(tensors[:9]), "two.safetensors": dict(tensors[9:])}
    weight_map = {name: file for file, half in halves.items() for name in half}
    for file, half in halves.items():
        write_shard(folder / file, half, padding=2**16)
    (folder / INDEX).write_text(json.dumps({"metadata": {"x": "y" * 2**16}, "weight_map": weight_map}))
    shape = opened(folder)
    assert shape is not None
    assert shape.layers == LAYERS
    return folder


@pytest.mark.parametrize("name", ["two.safetensors", INDEX])
def test_a_shard_or_index_that_ends_anywhere_in_its_first_64_kib_is_refused(sharded: Path, name: str) -> None:
    file = sharded / name
    os.truncate(file, 2**16)
    with little_memory():
        for length in range(2**16, -1, -64):
            os.truncate(file, length)
            assert opened(sharded) is None


def test_the_length_of_a_safetensors_header_may_lie(sharded: Path) -> None:
    with (sharded / "one.safetensors").open("r+b", buffering=0) as opened_file:
        truth = os.pread(opened_file.fileno(), 8, 0)
        (length,) = struct.unpack("<Q", truth)
        with little_memory():
            for lie in (0, 1, length - 1, length + 1, 10**8, 10**8 + 1, APPARENT - 8, 2**63, 2**64 - 1):
                os.pwrite(opened_file.fileno(), struct.pack("<Q", lie), 0)
                assert opened(sharded) is None
        os.pwrite(opened_file.fileno(), truth, 0)
    assert opened(sharded) is not None


LIES: list[Any] = [0, -1, 1, 31, 2**31, 2**63, 2**64, 10**400, 1e300, None, True, "", "F33", "Q4_0", [], {}]
LIES += [[0] * 9, [2**40, 2**40], [-1, 4], [0, 0], ["x"], [[]], [8, 4], {"a": 1}, "\0", "../x", "x" * 300]


def places(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Every container and key within JSON data."""
    for key in list(plain) if isinstance(plain, dict) else range(len(plain)):
        yield plain, key
        if isinstance(plain[key], dict | list):
            yield from places(plain[key])


def with_lies(content: bytes, write: Callable[[bytes], None], check: Callable[[], None]) -> None:
    """Each value within JSON data in turn is one lie after the other, or is not there at all."""
    plain = json.loads(content)
    for container, key in list(places(plain)):
        truth = container[key]
        for lie in LIES:
            container[key] = lie
            write(json.dumps(plain).encode())
            check()
        container[key] = truth
    for name in list(plain):
        truth = plain.pop(name)
        write(json.dumps(plain).encode())
        check()
        plain[name] = truth


def test_any_value_of_a_safetensors_header_may_lie(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    file = tmp_path / "model.safetensors"
    content = write_shard(file, safetensors_names())[8:]
    assert opened(tmp_path) is not None

    def write(header: bytes) -> None:
        with file.open("r+b", buffering=0) as opened_file:
            os.pwrite(opened_file.fileno(), struct.pack("<Q", len(header)) + header, 0)

    with_lies(content, write, lambda: opened(tmp_path))


def test_any_value_of_an_index_or_a_configuration_may_lie(sharded: Path) -> None:
    for name in (INDEX, "config.json"):
        content = json.loads((sharded / name).read_bytes())
        content.pop("metadata", None)
        with_lies(json.dumps(content).encode(), (sharded / name).write_bytes, lambda: opened(sharded))
        (sharded / name).write_text(json.dumps(content))
    assert opened(sharded) is not None


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_an_enormous_json_file_is_not_read(sharded: Path, name: str) -> None:
    os.truncate(sharded / name, APPARENT)
    with little_memory():
        assert opened(sharded) is None


def test_every_known_element_type_in_place_of_another_is_read_or_refused(gguf: tuple[Path, Writer]) -> None:
    path, written = gguf
    kinds = [at for at, form in written.numbers[-50:] if form == "<I"]
    for at in kinds:
        for kind in (*TYPES, 4, 5, 31, 2**32 - 1):
            changed(path, at, struct.pack("<I", kind))
