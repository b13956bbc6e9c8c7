"""The error tree: what leaves one server as an error arrives at the next as the same error."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.wire.errors import (
    ERRORS,
    MAX_RETRY_AFTER,
    BadRequest,
    CortexError,
    Internal,
    NodeLost,
    OverLimit,
    from_reply,
    headers_of,
    to_bytes,
    to_object,
)

names = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("kind", ERRORS)
def test_every_error_has_a_status_and_a_code_of_its_own(kind: type[CortexError]) -> None:
    assert 400 <= kind.status < 600
    assert [other for other in ERRORS if other.default_code == kind.default_code] == [kind]


def test_the_list_of_errors_is_complete() -> None:
    def below(kind: type[CortexError]) -> set[type[CortexError]]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(CortexError) if kind.__module__ == CortexError.__module__}
    assert ours - {CortexError} == set(ERRORS)


@given(
    st.sampled_from(ERRORS),
    st.text(min_size=1),
    st.none() | names,
    st.none() | st.floats(0, 1e6),
    st.dictionaries(names, json_values, max_size=3),
)
def test_an_error_survives_the_wire(
    kind: type[CortexError], message: str, param: str | None, wait: float | None, details: dict[str, object]
) -> None:
    for taken in ("message", "type", "code", "param"):
        details.pop(taken, None)
    error = kind(message, param=param, retry_after=wait, details=details)
    header = dict(headers_of(error)).get("retry-after")
    back = from_reply(error.status, to_bytes(error), header)
    assert type(back) is kind
    assert to_object(back) == to_object(error)
    assert back.retry_after == error.retry_after


@given(st.floats(0, 1e9))
def test_waits_are_whole_seconds_that_clients_honour(wait: float) -> None:
    error = OverLimit("later", retry_after=wait)
    assert error.retry_after is not None
    assert 1 <= error.retry_after <= MAX_RETRY_AFTER
    assert headers_of(error) == [("retry-after", str(error.retry_after))]
    assert error.retry_after >= min(wait, MAX_RETRY_AFTER)


def test_no_wait_means_no_header() -> None:
    assert headers_of(Internal("broken")) == []


@given(st.integers(400, 599), st.binary(max_size=400), st.none() | st.text(max_size=5))
def test_whatever_another_server_says_becomes_an_error(status: int, body: bytes, wait: str | None) -> None:
    error = from_reply(status, body, wait)
    assert error.message
    assert error.status == status or (type(error) is BadRequest and status < 500) or type(error) is NodeLost
    msgspec.json.decode(to_bytes(error))


@given(json_values, st.integers(400, 599))
def test_any_json_at_the_place_of_an_error_becomes_an_error(found: object, status: int) -> None:
    for body in ({"error": found}, {"error": {"message": found, "code": found, "param": found}}, found):
        error = from_reply(status, msgspec.json.encode(body))
        assert error.message
        msgspec.json.decode(to_bytes(error))


def test_a_code_decides_before_the_status_only_where_both_agree() -> None:
    body = to_bytes(CortexError("too long", code="context_length_exceeded"))
    assert type(from_reply(400, body)).__name__ == "ContextTooLong"
    assert type(from_reply(503, body)).__name__ == "Busy"


def test_the_cause_is_kept_when_the_body_is_no_envelope() -> None:
    assert from_reply(502, b"<html>Bad gateway</html>").message == "<html>Bad gateway</html>"
    assert from_reply(500, b'{"error": "CUDA out of memory"}').message == "CUDA out of memory"
    assert len(from_reply(500, b"x" * 5000).message) == 300
