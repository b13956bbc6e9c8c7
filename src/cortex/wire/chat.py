"""The canonical conversation: OpenAI chat completions as typed Structs that lose nothing.

Unknown fields of a decoded object are kept in its `extra` and come back when it is encoded. Knows
the shape of the conversation only: ranges and meanings are checked by whoever acts on them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from cortex.wire.errors import BadRequest


class Open(msgspec.Struct, kw_only=True, dict=True):
    """A Struct that keeps the fields it does not know."""

    @property
    def extra(self) -> dict[str, Any]:
        """Unknown fields as they were decoded, plain JSON values."""
        found: dict[str, Any] = self.__dict__.setdefault("extra", {})
        return found


class FunctionCall(Open, omit_defaults=True):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None
    """A JSON text as OpenAI has it; some clients send the object itself."""


class ToolCall(Open, omit_defaults=True):
    id: str | None = None
    index: int | None = None
    type: str | None = None
    function: FunctionCall | None = None


class ContentPart(Open, omit_defaults=True):
    type: str
    text: str | None = None


class Message(Open, omit_defaults=True):
    role: str
    content: str | list[ContentPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(Open, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Open, omit_defaults=True):
    type: str = "function"
    function: Function | None = None


class StreamOptions(Open, omit_defaults=True):
    include_usage: bool | None = None


class ChatRequest(Open, omit_defaults=True):
    """A chat completion request. None means that the client did not say."""

    model: str
    messages: list[Message]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class PromptTokensDetails(Open):
    cached_tokens: int = 0


class CompletionTokensDetails(Open):
    reasoning_tokens: int = 0


class Usage(Open):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | UnsetType | None = UNSET
    completion_tokens_details: CompletionTokensDetails | UnsetType | None = UNSET


class Timings(Open):
    """Our extension, on the last chunk and on a whole reply. Milliseconds and tokens per second."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    prompt_per_second: float = 0.0
    predicted_per_second: float = 0.0


class TokenLogprob(Open):
    """A token with its natural log probability; `bytes` is None for one that spells nothing."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class ContentLogprob(TokenLogprob):
    """A token of the reply, with the likeliest ones in its place."""

    top_logprobs: list[TokenLogprob] = []


class Logprobs(Open):
    """Of the tokens of a message, or of those whose text a chunk carries."""

    content: list[ContentLogprob] | None = None
    refusal: list[ContentLogprob] | None = None


class Delta(Open):
    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType | None = UNSET


class ChunkChoice(Open):
    index: int = 0
    delta: Delta = msgspec.field(default_factory=Delta)
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Open):
    """One event of a streamed reply."""

    id: str = ""
    object: str = "chat.completion.chunk"
    created: int = 0
    model: str = ""
    choices: list[ChunkChoice] = msgspec.field(default_factory=list)
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType | None = UNSET


class ReplyMessage(Open):
    role: str = "assistant"
    content: str | None = None
    reasoning_content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCall] | UnsetType | None = UNSET


class Choice(Open):
    index: int = 0
    message: ReplyMessage = msgspec.field(default_factory=ReplyMessage)
    logprobs: Logprobs | None = None
    finish_reason: str | None = None


class ChatCompletion(Open):
    """A whole reply."""

    id: str = ""
    object: str = "chat.completion"
    created: int = 0
    model: str = ""
    choices: list[Choice] = msgspec.field(default_factory=list)
    usage: Usage | UnsetType | None = UNSET
    timings: Timings | UnsetType | None = UNSET


T = TypeVar("T", bound=Open)


def decode(kind: type[T], body: bytes) -> T:
    """Read JSON into `kind`, unknown fields kept. Raises BadRequest that names the field at fault."""
    try:
        plain = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise unreadable(error) from None
    return convert(kind, plain)


def convert(kind: type[T], plain: Any) -> T:
    """As `decode`, from plain JSON values."""
    try:
        value = msgspec.convert(plain, kind)
    except msgspec.ValidationError as error:
        raise unreadable(error) from None
    _keep_unknown(value, plain)
    return value


def unreadable(error: Exception) -> BadRequest:
    """The refusal for a body that msgspec could not read; names the field at fault where there is one."""
    if isinstance(error, RecursionError):
        return BadRequest("The body is nested too deeply to be read.", code="invalid_json")
    if not isinstance(error, msgspec.ValidationError):
        return BadRequest(f"The body is not valid JSON: {error}.", code="invalid_json")
    message, _, path = str(error).partition(" - at ")
    if not path and message.startswith("Expected `object`, got"):
        return BadRequest(f"The body must be a JSON object. {message}.", code="invalid_json")
    field = path.strip("`").removeprefix("$").lstrip(".") or None
    if field and field.startswith("[...]"):
        field = None  # the body was read as any JSON: msgspec says only that it is a member
    missing = re.search(r"missing required field `(\w+)`", message)
    if missing:
        field = f"{field}.{missing[1]}" if field else missing[1]
    where = f" (at {field})" if field and not missing else ""
    return BadRequest(f"{message}{where}.", param=field)


def encode(value: Open) -> bytes:
    """JSON of `value`, its unknown fields included."""
    return msgspec.json.encode(to_plain(value))


def to_plain(value: Any) -> Any:
    """Plain JSON values of `value`, unknown fields of every Struct in it included, members as they came."""
    if isinstance(value, Open):
        plain = {
            name: to_plain(item)
            for name, item in zip(value.__struct_encode_fields__, _values(value), strict=True)
            if item is not UNSET and not (item is None and value.__struct_config__.omit_defaults)
        }
        plain.update(value.extra)
        sent = value.__dict__.get("sent", ())
        return {name: plain[name] for name in sent if name in plain} | plain
    if isinstance(value, list):
        return [to_plain(item) for item in value]
    return value


def _values(value: Open) -> list[Any]:
    return [getattr(value, name) for name in value.__struct_fields__]


def _keep_unknown(value: Any, plain: Any) -> None:
    if isinstance(value, Open) and isinstance(plain, dict):
        known = value.__struct_fields__
        if len(plain) > len(known) or not plain.keys() <= set(known):
            value.extra.update({name: item for name, item in plain.items() if name not in known})
        if [*(name for name in known if name in plain), *value.extra] != list(plain):
            # A tool's JSON reaches the model as text, so its members must keep the order they came in.
            value.__dict__["sent"] = tuple(plain)
        for name in known:
            item = getattr(value, name)
            if isinstance(item, Open | list):
                _keep_unknown(item, plain.get(name))
    elif isinstance(value, list) and isinstance(plain, list) and value and isinstance(value[0], Open):
        for item, raw in zip(value, plain, strict=True):
            _keep_unknown(item, raw)


class PeekDelta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Raw] | None = None


class PeekChoice(msgspec.Struct):
    delta: PeekDelta | None = None
    finish_reason: str | None = None


class PeekDetails(msgspec.Struct):
    cached_tokens: int | None = None


class PeekUsage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: PeekDetails | None = None


class Peek(msgspec.Struct):
    """What the gateway reads of a reply that it passes through: enough for metrics, nothing more."""

    choices: list[PeekChoice] = []
    usage: PeekUsage | None = None
    error: Any = None

    @property
    def carries_token(self) -> bool:
        """True if the chunk brings output: text, reasoning, or a part of a tool call."""
        for choice in self.choices:
            delta = choice.delta
            if delta and (delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls):
                return True
        return False

    @property
    def usage_only(self) -> bool:
        """True for the closing usage chunk, which has no choices."""
        return self.usage is not None and not self.choices


_peek: Final = msgspec.json.Decoder(Peek)
_NO_PEEK: Final = Peek()


def peek(data: bytes) -> Peek:
    """Read along; data that is not a chunk (`[DONE]`, another server's extra) peeks as empty."""
    try:
        return _peek.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _NO_PEEK


def edit_top_level(
    body: bytes, changes: Mapping[str, Any], inside: Mapping[str, Mapping[str, Any]] | None = None
) -> bytes:
    """Set top-level members of a JSON object; every other member keeps its exact bytes.

    `inside` sets members of those members that are objects, and makes them objects where they are not.
    Raises BadRequest if `body` is no JSON object.
    """
    try:
        members = msgspec.json.decode(body, type=dict[str, Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise unreadable(error) from None
    members.update({name: Raw(msgspec.json.encode(value)) for name, value in changes.items()})
    for name, more in (inside or {}).items():
        there = bytes(members.get(name, b""))
        members[name] = Raw(edit_top_level(there if there.startswith(b"{") else b"{}", more))
    return msgspec.json.encode(members)
