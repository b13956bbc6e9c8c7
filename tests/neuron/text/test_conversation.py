"""Messages and tools of a request as templates read them."""

from __future__ import annotations

from typing import Any

import pytest

from cortex.neuron.text.conversation import characters, plain_messages, plain_tools
from cortex.wire.chat import ChatRequest, convert
from cortex.wire.errors import BadRequest


def request(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    return convert(ChatRequest, {"model": "m", "messages": list(messages), **fields})


def one(message: dict[str, Any]) -> dict[str, Any]:
    return plain_messages(request(message))[0]


def calls(arguments: Any) -> Any:
    function = {"name": "f", "arguments": arguments}
    message = {"role": "assistant", "tool_calls": [{"id": "c", "type": "function", "function": function}]}
    return one(message)["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        ('{"b": 1, "a": [2.0, null]}', {"b": 1, "a": [2.0, None]}),
        ({"a": 1}, {"a": 1}),
        ("", {}),
        (" ", {}),
        ('{"a": 1', '{"a": 1'),
        ("[1]", "[1]"),
        ("[" * 100_000, "[" * 100_000),
    ],
)
def test_tool_call_arguments_become_objects_where_they_are_some(sent: Any, read: Any) -> None:
    found = calls(sent)
    assert found == read
    assert not isinstance(read, dict) or list(found) == list(read)


def test_content_is_null_only_beside_tool_calls() -> None:
    call = {"id": "c", "function": {"name": "f", "arguments": "{}"}}
    assert one({"role": "assistant"})["content"] == ""
    assert one({"role": "tool", "content": None})["content"] == ""
    assert one({"role": "assistant", "content": None, "tool_calls": [call]})["content"] is None
    assert one({"role": "assistant", "content": "x", "tool_calls": [call]})["content"] == "x"


def test_an_empty_list_of_tool_calls_is_none() -> None:
    assert "tool_calls" not in one({"role": "assistant", "content": "x", "tool_calls": []})


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_every_name_that_templates_know(name: str) -> None:
    message = one({"role": "assistant", "content": "x", name: "because"})
    assert message["reasoning_content"] == message["thinking"] == "because"


def test_what_the_client_sent_stays_as_it_came() -> None:
    parts = [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]
    sent = {"content": parts, "name": "bob", "role": "user", "custom": 7}
    assert one(sent) == sent
    assert list(one(sent)) == list(sent)


def test_tools_keep_the_order_of_their_members() -> None:
    tool = {"function": {"strict": True, "parameters": {"z": 1, "a": 2}, "name": "f"}, "type": "function"}
    plain = plain_tools(request({"role": "user", "content": ""}, tools=[tool]).tools)
    assert plain == [tool]
    assert str(plain) == str([tool])


def test_no_tools_are_none() -> None:
    assert plain_tools(None) is None
    assert plain_tools([]) is None


def test_an_empty_conversation_is_refused() -> None:
    with pytest.raises(BadRequest) as refusal:
        plain_messages(request())
    assert refusal.value.param == "messages"


@pytest.mark.parametrize("part", [{"type": "image_url", "image_url": {"url": "data:"}}, {"type": "text"}])
def test_parts_that_are_no_text_are_refused_where_they_stand(part: dict[str, Any]) -> None:
    text = {"type": "text", "text": "x"}
    message = {"role": "user", "content": [text, part]}
    with pytest.raises(BadRequest, match=part["type"]) as refusal:
        plain_messages(request({"role": "user", "content": "x"}, message))
    assert refusal.value.param == "messages[1].content[1]"


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": 5000 * "x"},
        {
            "role": "user",
            "content": [{"type": "text", "text": 2500 * "x"}, {"type": "text", "text": 2500 * "x"}],
        },
        {"role": "assistant", "content": "", "reasoning_content": 5000 * "x"},
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": 5000 * "x"}}],
        },
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": 5000 * "x"}}}],
        },
    ],
    ids=["content", "parts", "reasoning", "arguments", "argument objects"],
)
def test_a_conversation_is_long_wherever_its_characters_are(message: dict[str, Any]) -> None:
    request = convert(ChatRequest, {"model": "m", "messages": [message, message]})
    assert 10_000 <= characters(request) <= 10_500
