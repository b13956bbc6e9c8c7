"""The canonical conversation loses nothing, names what is wrong, and edits what it is told to edit."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cortex.wire.chat import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Open,
    decode,
    edit_top_level,
    encode,
    peek,
)
from cortex.wire.errors import BadRequest

unknown_names = st.from_regex(r"x_[a-z]{1,6}", fullmatch=True)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
extras = st.dictionaries(unknown_names, json_values, max_size=2)


def with_extras(known: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(st.fixed_dictionaries({}, optional=known), extras).map(lambda both: both[0] | both[1])


text = st.text(max_size=8)
function = with_extras({"name": text, "arguments": text | st.dictionaries(text, json_values, max_size=2)})
tool_calls = st.lists(
    with_extras({"id": text, "index": st.integers(0, 3), "type": text, "function": function}), max_size=2
)
part = st.tuples(text, with_extras({"text": text})).map(lambda both: {"type": both[0], **both[1]})
messages = st.lists(
    st.tuples(
        text,
        with_extras({"content": text | st.lists(part, max_size=2), "name": text, "tool_calls": tool_calls}),
    ).map(lambda both: {"role": both[0], **both[1]}),
    max_size=3,
)
requests = st.tuples(
    messages,
    with_extras(
        {
            "stream": st.booleans(),
            "stream_options": with_extras({"include_usage": st.booleans()}),
            "max_tokens": st.integers(0, 100),
            "temperature": st.integers(0, 2),
            "stop": text | st.lists(text, max_size=2),
            "tools": st.lists(
                with_extras({"type": text, "function": extras.map(lambda more: {"name": "f", **more})}),
                max_size=2,
            ),
            "tool_choice": text | extras,
            "logit_bias": st.dictionaries(text, st.integers(-5, 5), max_size=2),
        }
    ),
).map(lambda both: {"model": "m", "messages": both[0], **both[1]})
chunks = with_extras(
    {
        "id": text,
        "choices": st.lists(
            with_extras(
                {
                    "index": st.integers(0, 3),
                    "delta": with_extras({"content": st.none() | text, "tool_calls": tool_calls}),
                    "finish_reason": st.none() | text,
                }
            ),
            max_size=2,
        ),
        "usage": st.none()
        | with_extras({"prompt_tokens": st.integers(0, 9), "prompt_tokens_details": st.none() | extras}),
        "timings": with_extras({"queue_ms": st.integers(0, 5)}),
    }
)


@settings(max_examples=50)
@given(requests)
def test_a_request_keeps_all_that_it_had(request: dict[str, Any]) -> None:
    assert_survives(ChatRequest, request)


@settings(max_examples=50)
@given(chunks)
def test_a_chunk_keeps_all_that_it_had(chunk: dict[str, Any]) -> None:
    assert_survives(ChatChunk, chunk)


def assert_survives(kind: type[Open], value: dict[str, Any]) -> None:
    once = msgspec.json.decode(encode(decode(kind, msgspec.json.encode(value))))
    assert contains(once, value)
    assert msgspec.json.decode(encode(decode(kind, msgspec.json.encode(once)))) == once


def contains(whole: Any, part: Any) -> bool:
    """`whole` has all members of `part`, and perhaps defaults besides."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            name in whole and contains(whole[name], part[name]) for name in part
        )
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


def test_unknown_fields_are_found_under_extra() -> None:
    request = decode(
        ChatRequest, b'{"model":"m","messages":[{"role":"user","x":1}],"extra":{"y":2},"guided":true}'
    )
    assert request.extra == {"extra": {"y": 2}, "guided": True}
    assert request.messages[0].extra == {"x": 1}


def test_members_keep_the_order_they_came_in() -> None:
    body = b'{"messages":[{"zeta":1,"content":"hi","role":"user"}],"stream":true,"model":"m"}'
    assert encode(decode(ChatRequest, body)) == body


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"messages":[]}', "model"),
        (b'{"model":"m"}', "messages"),
        (b'{"model":7,"messages":[]}', "model"),
        (b'{"model":"m","messages":"hello"}', "messages"),
        (b'{"model":"m","messages":[{"role":"user"},{"content":"x"}]}', "messages[1].role"),
        (b'{"model":"m","messages":[{"role":"user","content":5}]}', "messages[0].content"),
        (b'{"model":"m","messages":[],"max_tokens":"many"}', "max_tokens"),
        (b'{"model":"m","messages":[],"max_tokens":1.5}', "max_tokens"),
        (b'{"model":"m","messages":[],"stream":"yes"}', "stream"),
        (b'{"model":"m","messages":[],"stream_options":{"include_usage":1}}', "stream_options.include_usage"),
        (b'{"model":"m","messages":[],"tools":[{"function":{}}]}', "tools[0].function.name"),
    ],
)
def test_a_wrong_field_is_named(body: bytes, field: str) -> None:
    with pytest.raises(BadRequest) as caught:
        decode(ChatRequest, body)
    assert caught.value.param == field
    assert field.rpartition(".")[2] in caught.value.message


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b'"x"', b"3", b"\xff", b"[" * 100_000])
def test_what_is_no_json_object_is_refused_as_such(body: bytes) -> None:
    for attempt in (lambda: decode(ChatRequest, body), lambda: edit_top_level(body, {})):
        with pytest.raises(BadRequest) as caught:
            attempt()
        assert (caught.value.status, caught.value.code) == (400, "invalid_json")
        assert caught.value.param is None


@pytest.mark.parametrize("body", [b'{"temperature":1e999}', b'{"x":[{"y":-1e999}]}'])
def test_a_number_that_is_no_number_names_no_member(body: bytes) -> None:
    with pytest.raises(BadRequest, match="out of range") as caught:
        decode(ChatRequest, body)
    assert caught.value.param is None
    assert "[...]" not in caught.value.message


@given(st.binary(max_size=60) | json_values.map(msgspec.json.encode))
def test_any_body_is_a_request_or_a_bad_request(body: bytes) -> None:
    for attempt in (lambda: decode(ChatRequest, body), lambda: decode(ChatCompletion, body)):
        try:
            attempt()
        except BadRequest as error:
            assert error.message


raw_members = st.dictionaries(
    st.text(min_size=1, max_size=5),
    st.sampled_from(
        [b"1.0", b"1e5", b'"\\u00e9"', b'"\xc3\xa9"', b"[ 1 , 2 ]", b'{"a" : 1, "a" : 2}', b"null", b"-0"]
    ),
    max_size=5,
)


@given(raw_members, st.dictionaries(st.text(min_size=1, max_size=5), json_values, max_size=2))
def test_an_edit_keeps_the_bytes_of_every_other_member(
    members: dict[str, bytes], changes: dict[str, Any]
) -> None:
    body = (
        b"{" + b" , ".join(msgspec.json.encode(name) + b" : " + raw for name, raw in members.items()) + b"}"
    )
    edited = edit_top_level(body, changes)
    back = msgspec.json.decode(edited, type=dict[str, msgspec.Raw])
    for name, raw in members.items():
        if name not in changes:
            assert bytes(back[name]) == raw
    for name, value in changes.items():
        assert msgspec.json.decode(back[name]) == value
    assert set(back) == set(members) | set(changes)


@given(st.binary(max_size=60) | json_values.map(msgspec.json.encode))
def test_peeking_never_fails(data: bytes) -> None:
    peek(data)


def test_peeking_into_something_too_deep_sees_nothing() -> None:
    assert peek(b'{"x":' + b"[" * 100_000).choices == []


@pytest.mark.parametrize(
    ("delta", "token"),
    [
        (b'{"content":"a"}', True),
        (b'{"reasoning_content":"a"}', True),
        (b'{"reasoning":"a"}', True),
        (b'{"tool_calls":[{"index":0}]}', True),
        (b'{"role":"assistant"}', False),
        (b'{"role":"assistant","content":""}', False),
        (b'{"content":null}', False),
    ],
)
def test_peeking_tells_tokens_from_the_rest(delta: bytes, token: bool) -> None:
    seen = peek(b'{"choices":[{"index":0,"delta":' + delta + b'}],"usage":null}')
    assert seen.carries_token is token
    assert not seen.usage_only


def test_peeking_knows_the_closing_usage() -> None:
    seen = peek(b'{"choices":[],"usage":{"prompt_tokens":3,"prompt_tokens_details":{"cached_tokens":2}}}')
    assert seen.usage_only
    assert seen.usage is not None
    assert seen.usage.prompt_tokens_details is not None
    assert seen.usage.prompt_tokens_details.cached_tokens == 2
