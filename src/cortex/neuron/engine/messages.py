"""What crosses the border between the node's HTTP process and a worker: msgpack, length-prefixed.

The HTTP process orders, the worker reports; neither side knows the other's modules.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final, Literal

import msgspec

from cortex.hookspecs import EngineStep, EngineTimings, Sampling, TokenLogprobs

WATCHDOG_S: Final = 60.0
"""Where the option `watchdog_s` is not given. A rank that keeps the others waiting for so long in a step is
given up, and with it the model."""
MAX_MESSAGE: Final = 64 * 2**20
"""Bytes. A longer message is a broken peer."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="op", omit_defaults=True):
    pass


class Load(_Message, frozen=True, kw_only=True, tag="load"):
    """Load one model. `path` is a GGUF file or a directory with safetensors."""

    path: str
    dtype: str
    """The form of the weights: `packed16`, `int8`, `int4` or `float32`."""
    device: str
    """`cpu`, or a CUDA device's uuid."""
    context: int
    """Tokens that one sequence may hold."""
    cache_tokens: int
    """Tokens that the whole KV cache holds."""
    prefill_chunk: int
    threads: int
    max_running: int = 8
    max_wait_s: float | None = None
    prefix_cache: bool = True
    checkpoints: int = 0
    """States that are kept on the host for later, where a model has layers with states."""
    windowed: bool = False
    """Layers with a window keep that and what a step computes, not whole sequences; they have states then."""
    rank: int = 0
    world: int = 1
    """Ranks of the model; of more than one, this is `rank`."""
    options: Mapping[str, Any] = {}


def has_pages(device: str, options: Mapping[str, Any]) -> bool:
    """Whether a model's cache has pages on this device, with these options of a load."""
    return device != "cpu" and any(options.get(name) is True for name in ("cuda_paged", "cuda_graphs"))


class Generate(_Message, frozen=True, kw_only=True, tag="generate"):
    """Start a sequence; `key` names it on this border and is never used twice."""

    key: int
    request_id: str
    ids: list[int]
    sampling: Sampling


class Cancel(_Message, frozen=True, kw_only=True, tag="cancel"):
    """Stop a sequence; unknown keys (already finished) are ignored. Nothing is answered."""

    key: int


class Threads(_Message, frozen=True, kw_only=True, tag="threads"):
    """Compute with at most so many CPU threads from now on."""

    threads: int


Order = Load | Generate | Cancel | Threads


class LoadProgress(_Message, frozen=True, kw_only=True, tag="load_progress"):
    phase: str
    done: int
    total: int


class Ready(_Message, frozen=True, kw_only=True, tag="ready"):
    """The model is loaded. Bytes are what the worker measured, for the node's report."""

    weight_bytes: int
    cache_bytes: int


class LoadRefused(_Message, frozen=True, kw_only=True, tag="load_refused"):
    """The load failed; the worker ends after it. `code` is a code of `wire.errors`."""

    code: str
    message: str


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, array_like=True):
    """What one step gave one sequence."""

    key: int
    ids: list[int]
    finish: Literal["stop", "length"] | None = None
    timings: EngineTimings | None = None
    error: str | None = None
    """The sequence failed; the engine goes on."""
    code: str | None = None
    """Of an error: `busy` if it never started, `invalid` if it cannot be run at all, else none."""
    cached_tokens: int | None = None
    """On the first output."""
    logprobs: list[TokenLogprobs] | None = None


class Step(_Message, frozen=True, kw_only=True, tag="step"):
    """All outputs of one step, and what it did; refusals come without a step."""

    outputs: list[Output]
    done: EngineStep | None = None


class Broken(_Message, frozen=True, kw_only=True, tag="broken"):
    """The engine cannot go on; the worker ends after it. `reason` follows "it"."""

    reason: str
    cause: Literal["engine", "step", "silence"] = "engine"
    """`step`: one failed on a rank that does not report steps, and its sequences may be at fault; `silence`:
    another rank did not take part, and this one noticed."""


Report = LoadProgress | Ready | LoadRefused | Step | Broken

_order_decoder: Final = msgspec.msgpack.Decoder(Order)
_report_decoder: Final = msgspec.msgpack.Decoder(Report)
_encoder: Final = msgspec.msgpack.Encoder()
_LENGTH: Final = struct.Struct("<I")


def frame(message: Order | Report) -> bytes:
    return framed(_encoder.encode(message))


def framed(body: bytes) -> bytes:
    """The body of a message with its length before it."""
    return _LENGTH.pack(len(body)) + body


class Unframer:
    """Takes bytes in any split and gives whole message bodies."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Raises ValueError on a length over MAX_MESSAGE."""
        self._buffer += data
        bodies = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_MESSAGE:
                raise ValueError(f"a message of {length} bytes is over the limit of {MAX_MESSAGE}")
            end = start + _LENGTH.size + length
            if len(self._buffer) < end:
                break
            bodies.append(bytes(self._buffer[start + _LENGTH.size : end]))
            start = end
        del self._buffer[:start]
        return bodies


def decode_order(body: bytes) -> Order:
    order: Order = _order_decoder.decode(body)
    return order


def decode_report(body: bytes) -> Report:
    report: Report = _report_decoder.decode(body)
    return report
