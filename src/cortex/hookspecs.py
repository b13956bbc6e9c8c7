"""The hooks that extend cortex, and the protocols of what they register.

Built-in dialects, eviction strategies, observers and engines come through these hooks exactly as a
stranger's do. Hooks are called once, at start-up, and never on the request path.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Final, Literal, Protocol

import msgspec
import pluggy

from cortex.wire.chat import Peek
from cortex.wire.errors import CortexError
from cortex.wire.node import Limit, ModelCard, Progress
from cortex.wire.sse import Event

hookspec: Final = pluggy.HookspecMarker("cortex")

# --- dialects -------------------------------------------------------------------------------------

Headers = Mapping[str, str]
"""Header names in lower case; of a repeated header the first value."""

Rendered = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers, body."""


class Kind(StrEnum):
    """What an operation asks for."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    COUNT_TOKENS = "count_tokens"
    MODELS = "models"


def always(headers: Headers) -> bool:
    return True


class Operation(msgspec.Struct, frozen=True):
    """A route of a dialect. `path` may hold `{name}` or, for a part with slashes, `{name:path}`.

    `matches` decides between dialects that share a path.
    """

    method: str
    path: str
    kind: Kind
    matches: Callable[[Headers], bool] = always


class Incoming(msgspec.Struct, frozen=True, kw_only=True):
    """A client's request before its dialect has read it."""

    kind: Kind
    body: bytes
    headers: Headers
    params: Mapping[str, str] = {}
    query: Mapping[str, str] = {}


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """A client's request as its dialect understood it.

    `model` is the name that the client used ("" for a whole listing); `body` is the canonical (OpenAI)
    body. The gateway sets `served_model` once it knows which model serves the request; a reply must
    carry `model` again.
    """

    kind: Kind
    model: str
    body: bytes = b""
    stream: bool = False
    wants_usage: bool = False
    """The client asked for the usage chunk of a stream; without it the encoder withholds the chunk."""
    served_model: str = ""
    detail: Any = None
    """Whatever the dialect wants to find again when it renders the reply."""

    @property
    def renamed(self) -> bool:
        return self.served_model != self.model


class Encoder(Protocol):
    """Turns one canonical stream into bytes of the client's dialect. Synchronous, one per stream."""

    def feed(self, event: Event, peek: Peek) -> bytes:
        """One canonical event; `event.raw` is what the node sent, byte for byte."""

    def keep_alive(self) -> bytes:
        """Something that shows the client life and means nothing."""

    def fail(self, error: CortexError) -> bytes:
        """The stream ends in an error; the last bytes of it."""

    def finish(self) -> bytes:
        """The node's stream is over; the last bytes of ours."""


class Dialect(Protocol):
    """A client-facing API, without I/O. May raise any CortexError from `parse`."""

    @property
    def name(self) -> str: ...

    @property
    def operations(self) -> Sequence[Operation]: ...

    def credential(self, headers: Headers) -> str | None: ...

    def parse(self, incoming: Incoming) -> Call: ...

    def stream(self, call: Call) -> Encoder: ...

    def render(self, call: Call, reply: bytes) -> bytes:
        """A whole canonical reply (a chat completion's JSON) as this dialect's body."""

    def render_models(self, call: Call, cards: Sequence[ModelCard]) -> bytes:
        """The listing, or with `call.model` set the one card that is given."""

    def render_error(self, error: CortexError) -> Rendered: ...


# --- eviction -------------------------------------------------------------------------------------


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """A resident model that may be evicted. Times are seconds of the gateway's monotonic clock."""

    model_id: str
    bytes_per_device: Mapping[str, int]
    last_used: float
    uses: int
    load_seconds: float
    priority: int


class EvictionStrategy(Protocol):
    """Pure: pinned, busy, held and loading models are never among the candidates."""

    @property
    def name(self) -> str: ...

    def choose(self, needed: Mapping[str, int], candidates: Sequence[Candidate], now: float) -> list[str]:
        """Model ids whose eviction frees `needed` bytes on each device, first victim first."""


# --- observers ------------------------------------------------------------------------------------


class RequestStarted(msgspec.Struct, frozen=True, kw_only=True):
    request_id: str
    dialect: str
    kind: Kind
    model: str
    """The catalogue's id, or "unknown": never a client's free text."""
    node: str


class RequestEnded(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is over. Durations are in seconds; None where there was nothing to measure."""

    request_id: str
    dialect: str
    kind: Kind
    model: str
    node: str
    """"" if no node was reached."""
    outcome: Literal["ok", "refused", "failed", "client_gone"]
    status: int
    streamed: bool
    duration: float
    overhead: float
    """Spent in the gateway itself before the request went to a node."""
    time_to_first_token: float | None = None
    inter_token_latency: float | None = None
    """Mean gap between two output events of a stream."""
    tokens_per_second: float | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    started: bool = False
    """The node still counted it as in flight: a RequestStarted without a RequestRetried after it."""


class RequestRetried(msgspec.Struct, frozen=True, kw_only=True):
    """The node did not serve the request, which leaves it for another one."""

    model: str
    node: str
    reason: str


class NodePolled(msgspec.Struct, frozen=True, kw_only=True):
    """A node's state after a poll; `states` maps its models to their status."""

    node: str
    up: bool
    states: Mapping[str, str] = {}
    devices: Sequence[Mapping[str, float]] = ()


ObserverEvent = RequestStarted | RequestEnded | RequestRetried | NodePolled


class Observer(Protocol):
    @property
    def name(self) -> str: ...

    def on_event(self, event: ObserverEvent) -> None:
        """Synchronous and quick; what it raises is logged and goes no further."""


# --- engines --------------------------------------------------------------------------------------


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How tokens are chosen. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    Logits go through `logit_bias`, then the three penalties, then temperature, top_k, top_p and min_p.
    """

    max_tokens: int
    reserve: int | None = None
    """Tokens of the reply for which cache is set aside before the sequence starts; None for all of
    `max_tokens`. A sequence may outgrow a smaller reserve, and may then be preempted and resumed."""
    min_tokens: int = 0
    """Until so many are generated, no stop id is chosen."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of every token in prompt and reply; 1 is off."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the reply holds."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token for each time that the reply holds it."""
    logit_bias: Mapping[int, float] = {}
    """Added to the logits of these ids."""
    logprobs: int | None = None
    """None for no log probabilities; else those of each token and of so many likeliest ones."""
    seed: int | None = None
    stop_ids: tuple[int, ...] = ()

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


class SamplingDefaults(msgspec.Struct, frozen=True, kw_only=True):
    """What a model's makers recommend; None where they say nothing."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


class EngineTimings(msgspec.Struct, frozen=True, kw_only=True):
    """Milliseconds that a sequence spent waiting, in prefill and in decode."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """The natural log probability of a generated token in the model's own distribution, before any
    setting of `Sampling` has changed it; `top` are the likeliest ids with theirs, likeliest first."""

    id: int
    logprob: float
    top: list[tuple[int, float]]


class TokenBatch(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one sequence; a stop id that ended it is not among them."""

    ids: list[int]
    finish: Literal["stop", "length"] | None = None
    timings: EngineTimings | None = None
    """On the last batch."""
    cached_tokens: int | None = None
    """On the first batch: prompt tokens that were not computed, because the prefix cache had them."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each of `ids`, where `Sampling.logprobs` asked for them."""


class EngineStep(msgspec.Struct, frozen=True, kw_only=True):
    """What one step of an engine did, for metrics. Counts are of this step alone; `running`, `waiting`
    and the cache's figures are how it stands after the step."""

    seconds: float = 0.0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    running: int = 0
    waiting: int = 0
    cache_used_tokens: int = 0
    """Held by running sequences."""
    cache_total_tokens: int = 0
    prefix_queried_tokens: int = 0
    """Prompt tokens of the sequences that were started in this step."""
    prefix_hit_tokens: int = 0
    """Those of them that the prefix cache had."""
    preemptions: int = 0
    draft_tokens: int = 0
    """Computed in case a sequence goes on with them."""
    accepted_draft_tokens: int = 0
    """Those of them that it went on with, which are among `decode_tokens`."""


class TokenEngine(Protocol):
    """Runs one model on token ids. Knows no text."""

    def generate(self, request_id: str, ids: Sequence[int], sampling: Sampling) -> AsyncIterator[TokenBatch]:
        """Yields until a batch has `finish`. Closing the iterator cancels the sequence.

        Raises CortexError if the engine dies or refuses.
        """


class Detokenizer(Protocol):
    """Ids in, text out, one per sequence; never gives half a character."""

    def feed(self, ids: Sequence[int]) -> str: ...

    def flush(self) -> str:
        """What is left at the end, incomplete characters as U+FFFD."""


class Codec(Protocol):
    """The text side of a model: tokenizer and chat template."""

    @property
    def stop_ids(self) -> tuple[int, ...]: ...

    @property
    def defaults(self) -> SamplingDefaults: ...

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """The prompt for a conversation. Raises BadRequest with the template's own complaint."""

    def encode(self, text: str) -> list[int]:
        """Ids of a rendered prompt: special tokens in the text count, none are added."""

    def token_bytes(self, id: int) -> bytes:
        """What one id spells, a special token its name; b"" for an id that is no token."""

    def detokenizer(self) -> Detokenizer: ...


class LoadOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What to load, once the reference has become a path and the devices are known."""

    model_id: str
    path: str
    quant: str | None = None
    dtype: str | None = None
    tensor_parallel: int = 1
    """Ranks that hold the model together."""
    devices: tuple[str, ...] = ("cpu",)
    """Device uuids, one a rank; `cpu` is the host, and stands there for every rank if for any."""
    memory_bytes: int | None = None
    """Budget per device for weights, cache and process; None lets the factory propose one."""
    threads: int = 1
    max_running: int = 8
    """Sequences that run at a time; more of them wait."""
    max_wait_s: float | None = None
    """A sequence that has not started after so long fails with Busy; None for no limit."""
    prefix_cache: bool = True
    state_bytes: int = 2**30
    """Most host memory for states of recurrent layers that the prefix cache keeps."""
    options: Mapping[str, Any] = {}


class LoadPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a load will take and give, found out without loading anything."""

    order: LoadOrder
    bytes_per_device: Mapping[str, int]
    """By uuid; `cpu` may be there beside the order's devices, for what is kept on the host."""
    limit: Limit
    capabilities: tuple[str, ...] = ("text",)
    tool_call: bool = False
    reasoning: bool = False
    detail: Any = None


class LoadedModel(Protocol):
    """A model that runs. Its owner calls `close` once; `died` completes if it ends by itself."""

    @property
    def engine(self) -> TokenEngine: ...

    @property
    def codec(self) -> Codec: ...

    def watch(self, seen: Callable[[EngineStep], None]) -> None:
        """Call `seen` after every step from now on; an engine without steps never does."""

    def set_threads(self, threads: int) -> None:
        """From the next step on, compute with at most so many CPU threads; a hint."""

    async def died(self) -> str:
        """Waits until the engine has ended by itself and tells why."""

    async def close(self) -> None:
        """Ends it and returns when all of its memory is back."""


class EngineFactory(Protocol):
    """Loads models with one kind of engine. Registered by name, which orders call `harness`."""

    @property
    def name(self) -> str: ...

    def plan(self, order: LoadOrder) -> LoadPlan:
        """Reads headers only; runs off the event loop. Raises BadRequest or LoadFailed."""

    async def load(self, plan: LoadPlan, report: Callable[[Progress], None]) -> LoadedModel:
        """Cancelling it frees everything. Raises LoadFailed."""

    async def start(self) -> None:
        """Called once before the node listens."""

    async def stop(self) -> None: ...


class CortexHooks:
    """Every hook of cortex. `register` takes one object at a time and refuses a name twice."""

    @hookspec
    def cortex_register_dialects(self, register: Callable[[Dialect], None]) -> None:
        """Add client-facing APIs to the gateway."""

    @hookspec
    def cortex_register_eviction_strategies(self, register: Callable[[EvictionStrategy], None]) -> None:
        """Add ways to choose which model makes room."""

    @hookspec
    def cortex_register_observers(self, register: Callable[[Observer], None]) -> None:
        """Add receivers of the gateway's events."""

    @hookspec
    def cortex_register_engines(self, register: Callable[[EngineFactory], None]) -> None:
        """Add engines to a neuron (entry-point group `cortex.engines`)."""
