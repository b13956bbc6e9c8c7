"""The OpenAI dialect: what passes through passes untouched, what is edited is edited only there."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.harnesses.openai import OpenAIDialect
from cortex.hookspecs import Call, Incoming, Kind
from cortex.wire import sse
from cortex.wire.chat import peek
from cortex.wire.errors import BadRequest, Busy, CortexError
from cortex.wire.node import Limit, ModelCard

dialect = OpenAIDialect()

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


def parse(body: bytes) -> Call:
    return dialect.parse(Incoming(kind=Kind.CHAT, body=body, headers={}))


def chunk(**fields: object) -> sse.Event:
    data = msgspec.json.encode({"id": "c", "model": "served", **fields})
    return sse.Decoder().feed(sse.encode(data))[0]


def call(**fields: object) -> Call:
    return msgspec.structs.replace(
        Call(kind=Kind.CHAT, model="served", served_model="served", stream=True), **fields
    )


def test_a_request_keeps_its_bytes():
    body = b'{ "model":"m", "messages":[{"role":"user","content":"hi"}], "vendor": {"x": 1.50} }'
    assert parse(body).body is body


@pytest.mark.parametrize(
    ("body", "stream", "usage"),
    [
        (b'{"model":"m","messages":[{}]}', False, False),
        (b'{"model":"m","messages":[{}],"stream":true}', True, False),
        (b'{"model":"m","messages":[{}],"stream":true,"stream_options":{"include_usage":true}}', True, True),
        (b'{"model":"m","messages":[{}],"stream":true,"stream_options":null}', True, False),
    ],
)
def test_stream_and_usage_are_understood(body, stream, usage):
    assert (parse(body).stream, parse(body).wants_usage) == (stream, usage)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"{nope", "invalid_json", None),
        (b'{"model":"m"', "invalid_json", None),
        (b"\xff\xfe", "invalid_json", None),
        (b"[]", "invalid_json", None),
        (b'{"messages":[{}]}', "missing_model_field", "model"),
        (b'{"model":"","messages":[{}]}', "missing_model_field", "model"),
        (b'{"model":7,"messages":[{}]}', "invalid_request", "model"),
        (b'{"model":"m"}', "invalid_request", "messages"),
        (b'{"model":"m","messages":[]}', "invalid_request", "messages"),
        (b'{"model":"m","messages":"hi"}', "invalid_request", "messages"),
        (b'{"model":"m","messages":[{}],"stream":"yes"}', "invalid_request", "stream"),
        (b'{"x":' + b"[" * 100_000, "invalid_json", None),
    ],
)
def test_bad_bodies_are_refused_by_name(body, code, param):
    with pytest.raises(BadRequest) as refused:
        parse(body)
    assert (refused.value.code, refused.value.param) == (code, param)


@given(JSON)
def test_any_json_is_a_call_or_a_refusal(value):
    try:
        assert parse(msgspec.json.encode(value)).model
    except BadRequest as error:
        assert error.message


@given(st.binary(max_size=64))
def test_any_bytes_are_a_call_or_a_refusal(body):
    try:
        assert parse(body).model
    except BadRequest as error:
        assert error.message


def test_events_pass_byte_for_byte():
    event = chunk(choices=[{"index": 0, "delta": {"content": "hi"}}], vendor=[1, 2])
    encoder = dialect.stream(call())
    assert encoder.feed(event, peek(event.data)) == event.raw


def test_an_alias_is_carried_again_and_nothing_else_changes():
    event = chunk(choices=[{"delta": {"content": "hi"}}], vendor=[1, 2])
    sent = dialect.stream(call(model="alias")).feed(event, peek(event.data))
    changed = msgspec.json.decode(sse.Decoder().feed(sent)[0].data)
    assert changed == {**msgspec.json.decode(event.data), "model": "alias"}


def test_usage_that_was_not_asked_for_is_withheld():
    event = chunk(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3})
    assert dialect.stream(call()).feed(event, peek(event.data)) == b""
    assert dialect.stream(call(wants_usage=True)).feed(event, peek(event.data)) == event.raw


def test_a_missing_end_is_added_once():
    encoder = dialect.stream(call())
    assert encoder.finish() == sse.DONE
    done = sse.Decoder().feed(sse.DONE)[0]
    encoder = dialect.stream(call(model="alias"))
    assert encoder.feed(done, peek(done.data)) == sse.DONE
    assert encoder.finish() == b""


def test_a_failure_in_a_stream_is_an_error_event():
    data = dialect.stream(call()).fail(CortexError("broken", details={"node": "a"}))
    assert msgspec.json.decode(sse.Decoder().feed(data)[0].data)["error"] == {
        "node": "a",
        "message": "broken",
        "type": "api_error",
        "code": "internal_error",
        "param": None,
    }


def test_keep_alive_is_no_event_with_data():
    assert dialect.stream(call()).keep_alive().startswith(b":")


def test_whole_replies_pass_unless_renamed():
    reply = b'{"id": "x", "model": "served", "n": 1.0}'
    assert dialect.render(call(), reply) is reply
    assert msgspec.json.decode(dialect.render(call(model="alias"), reply)) == {
        "id": "x",
        "model": "alias",
        "n": 1.0,
    }


def test_errors_carry_status_and_retry_after():
    status, headers, body = dialect.render_error(Busy("later", retry_after=2.1))
    assert status == 503
    assert ("retry-after", "3") in headers
    assert msgspec.json.decode(body)["error"]["code"] == "busy"


def test_models_are_listed_and_shown():
    card = ModelCard(id="m", loaded=True, limit=Limit(context=4096))
    listed = msgspec.json.decode(dialect.render_models(Call(kind=Kind.MODELS, model=""), [card]))
    assert listed["object"] == "list"
    assert listed["data"][0] | {"id": "m", "loaded": True, "max_model_len": 4096} == listed["data"][0]
    shown = msgspec.json.decode(dialect.render_models(Call(kind=Kind.MODELS, model="m"), [card]))
    assert shown == listed["data"][0]


@pytest.mark.parametrize(
    ("header", "token"),
    [("Bearer k", "k"), ("bearer  k ", "k"), ("Basic k", None), ("", None), ("Bearer", None)],
)
def test_credentials_are_bearer_tokens(header, token):
    assert dialect.credential({"authorization": header}) == token
