"""The conversation of a chat request as the plain values that chat templates expect.

Only re-shapes: every value is the client's own. Knows no template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cortex.wire.chat import ChatRequest, ContentPart, Message, Tool, to_plain
from cortex.wire.errors import BadRequest

_PER_MESSAGE = 64
_PER_TOOL = 512
"""Characters that a message has beside its content, and a tool with its parameters, in most prompts."""
_REASONING_NAMES = ("reasoning_content", "thinking", "reasoning")


def characters(request: ChatRequest) -> int:
    """About how many the conversation has, and the tools with it: enough to tell a long one."""
    tools = _PER_TOOL * len(request.tools or ())
    return tools + sum(map(_length, request.messages))


def _length(message: Message) -> int:
    content = message.content
    texts = [part.text for part in content] if isinstance(content, list) else [content]
    texts.append(message.reasoning_content)
    for call in message.tool_calls or ():
        arguments = call.function.arguments if call.function else None
        texts.append(arguments if isinstance(arguments, str) else str(arguments or ""))
    return _PER_MESSAGE + sum(len(text or "") for text in texts)


def plain_messages(request: ChatRequest) -> list[dict[str, Any]]:
    """The messages as templates read them.

    - `content` is always there. Null becomes "", but stays null beside tool calls, where templates ask.
    - Tool-call arguments in JSON text become the object; text that is no JSON object stays text.
    - An empty list of tool calls is left out, as templates only ask whether there is one.
    - Reasoning is found under every name that templates know.

    Raises BadRequest for an empty conversation and for content parts other than text.
    """
    if not request.messages:
        raise BadRequest("messages is empty; send at least one message.", param="messages")
    return [_plain_message(message, f"messages[{i}]") for i, message in enumerate(request.messages)]


def plain_tools(tools: Sequence[Tool] | None) -> list[dict[str, Any]] | None:
    """The tools, None if there are none."""
    return [to_plain(tool) for tool in tools] if tools else None


def _plain_message(message: Message, where: str) -> dict[str, Any]:
    if isinstance(message.content, list):
        _check_parts(message.content, f"{where}.content")
    plain: dict[str, Any] = to_plain(message)
    calls = plain.pop("tool_calls", None)
    if calls:
        plain["tool_calls"] = [_with_parsed_arguments(call) for call in calls]
    if message.content is None:
        plain["content"] = None if calls else ""
    reasoning = next((plain[name] for name in _REASONING_NAMES if plain.get(name) is not None), None)
    if reasoning is not None:
        plain.setdefault("thinking", reasoning)
        plain["reasoning_content"] = reasoning
    return plain


def _check_parts(parts: Sequence[ContentPart], where: str) -> None:
    for i, part in enumerate(parts):
        if part.type != "text" or part.text is None:
            raise BadRequest(
                f"{where}[{i}] is a part of type {part.type!r}; this model reads only parts of type 'text'"
                " with a text.",
                param=f"{where}[{i}]",
            )


def _with_parsed_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function") or {}
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return dict(call)
    return {**call, "function": {**function, "arguments": _parsed(arguments)}}


def _parsed(arguments: str) -> Any:
    if not arguments.strip():
        return {}
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
