"""The event framing: nothing is lost, no cut of the bytes changes the events, and size is bounded."""

import itertools
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cortex.testing import every_split
from cortex.wire.errors import NodeLost
from cortex.wire.sse import DONE, Decoder, Event, comment, encode


def decode(*chunks: bytes, max_event: int = 1 << 20) -> tuple[list[Event], bytes]:
    decoder = Decoder(max_event)
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return [*events, *decoder.close()], decoder.pending


CASES = {
    "one event": (b"data: a\n\n", [Event(b"a", raw=b"data: a\n\n")]),
    "no space after the colon": (b"data:a\n\n", [Event(b"a", raw=b"data:a\n\n")]),
    "only one space is dropped": (b"data:  a\n\n", [Event(b" a", raw=b"data:  a\n\n")]),
    "several lines of data": (b"data: a\ndata: b\n\n", [Event(b"a\nb", raw=b"data: a\ndata: b\n\n")]),
    "data without a value": (b"data\n\n", [Event(b"", raw=b"data\n\n")]),
    "event and id": (
        b"event: message_start\nid: 7\ndata: {}\n\n",
        [Event(b"{}", "message_start", "7", b"event: message_start\nid: 7\ndata: {}\n\n")],
    ),
    "an id with NUL is ignored": (b"id: a\0b\ndata: x\n\n", [Event(b"x", raw=b"id: a\0b\ndata: x\n\n")]),
    "unknown fields are ignored": (
        b"retry: 5\nx: y\ndata: a\n\n",
        [Event(b"a", raw=b"retry: 5\nx: y\ndata: a\n\n")],
    ),
    "a comment is kept as raw": (b": ping\n\n", [Event(b"", raw=b": ping\n\n")]),
    "a comment inside an event": (b": ping\ndata: a\n\n", [Event(b"a", raw=b": ping\ndata: a\n\n")]),
    "surplus blank lines": (
        b"data: a\n\n\n\ndata: b\n\n",
        [Event(b"a", raw=b"data: a\n\n"), Event(b"", raw=b"\n\n"), Event(b"b", raw=b"data: b\n\n")],
    ),
    "CR LF": (
        b"data: a\r\n\r\ndata: b\r\ndata: c\r\n\r\n",
        [Event(b"a", raw=b"data: a\r\n\r\n"), Event(b"b\nc", raw=b"data: b\r\ndata: c\r\n\r\n")],
    ),
    "CR alone": (
        b"data: a\r\rdata: b\rdata: c\r\r",
        [Event(b"a", raw=b"data: a\r\r"), Event(b"b\nc", raw=b"data: b\rdata: c\r\r")],
    ),
    "line ends mixed": (
        b"data: a\n\r\ndata: b\r\ndata: c\n\n",
        [Event(b"a", raw=b"data: a\n\r\n"), Event(b"b\nc", raw=b"data: b\r\ndata: c\n\n")],
    ),
    "a CR in the data ends the line": (
        b"data: a\rdata: b\n\n",
        [Event(b"a\nb", raw=b"data: a\rdata: b\n\n")],
    ),
    "a byte order mark": (b"\xef\xbb\xbfdata: a\n\n", [Event(b"a", raw=b"\xef\xbb\xbfdata: a\n\n")]),
    "a later byte order mark is no mark": (
        b"data: a\n\n\xef\xbb\xbfdata: b\n\n",
        [Event(b"a", raw=b"data: a\n\n"), Event(b"", raw=b"\xef\xbb\xbfdata: b\n\n")],
    ),
    "several bytes a character": (
        "data: é€😀\n\n".encode(),
        [Event("é€😀".encode(), raw="data: é€😀\n\n".encode())],
    ),
    "the end of a stream": (DONE, [Event(b"[DONE]", raw=DONE)]),
}


@pytest.mark.parametrize(("data", "events"), CASES.values(), ids=CASES)
def test_no_cut_changes_the_events(data: bytes, events: list[Event]) -> None:
    for chunks in every_split(data):
        assert decode(*chunks) == (events, b"")


@pytest.mark.parametrize(
    "rest", [b"data: b", b"data: b\n", b": half", b"\n", b"\r", b"data: b\r\n", b"\xef\xbb"]
)
def test_an_event_that_did_not_end_stays_pending(rest: bytes) -> None:
    for chunks in every_split(b"data: a\n\n" + rest):
        assert decode(*chunks) == ([Event(b"a", raw=b"data: a\n\n")], rest)


def test_an_event_is_given_with_the_byte_that_ends_it() -> None:
    decoder = Decoder()
    assert decoder.feed(b"data: a\n") == []
    assert [event.data for event in decoder.feed(b"\n")] == [b"a"]
    assert decoder.feed(b"data: b\r\n\r") == []
    assert [event.raw for event in decoder.feed(b"\n")] == [b"data: b\r\n\r\n"]


stream_bytes = st.lists(
    st.sampled_from(
        [b"data: a", b"data", b":", b"id: 1", b"event: e", b"\n", b"\r", b"\r\n", b"\n\n", b"\xef\xbb\xbf"]
    )
    | st.binary(max_size=4)
).map(b"".join)


@given(stream_bytes, st.lists(st.integers(0, 60), max_size=6))
@example(b"\r\r\n\n\r", [1, 2, 3, 4])
def test_nothing_is_lost_and_cuts_do_not_matter(data: bytes, cuts: list[int]) -> None:
    whole, pending = decode(data)
    assert b"".join(event.raw for event in whole) + pending == data
    places = [0, *sorted(cut for cut in cuts if cut <= len(data)), len(data)]
    assert decode(*(data[a:b] for a, b in itertools.pairwise(places))) == (whole, pending)


@given(stream_bytes)
def test_events_end_in_exactly_one_blank_line(data: bytes) -> None:
    blank = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
    for event in decode(data)[0]:
        matches = list(blank.finditer(event.raw))
        assert [match.end() for match in matches] == [len(event.raw)]


@given(
    st.binary(max_size=60),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\0")),
)
def test_what_was_encoded_is_decoded(data: bytes, name: str, id: str) -> None:
    if data.startswith(b"\xef\xbb\xbf"):
        data = b"x" + data
    (event,), pending = decode(encode(data, name, id))
    assert event.data == data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    assert (event.event, event.id, pending) == (name, id, b"")


def test_encoding_has_the_plainest_form() -> None:
    assert encode(b"{}") == b"data: {}\n\n"
    assert encode(b"a\nb", event="e", id="1") == b"event: e\nid: 1\ndata: a\ndata: b\n\n"
    assert comment("ping") == b": ping\n\n"
    assert comment("two\nlines") == b": two\n: lines\n\n"
    assert comment("") == b": \n\n"


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\0b"])
def test_names_that_would_forge_fields_are_refused(bad: str) -> None:
    with pytest.raises(ValueError, match="event"):
        encode(b"x", event=bad)
    with pytest.raises(ValueError, match="id"):
        encode(b"x", id=bad)


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
def test_an_event_over_the_limit_is_refused_however_it_is_cut(line_end: bytes) -> None:
    fits = b"data: " + b"x" * (32 - 6 - 2 * len(line_end)) + line_end * 2
    assert len(fits) == 32
    for chunks in every_split(fits):
        assert len(decode(*chunks, max_event=32)[0]) == 1
    for chunks in every_split(fits.replace(b"x", b"xy", 1)):
        with pytest.raises(NodeLost, match="more than 32 bytes"):
            decode(*chunks, max_event=32)


def test_the_limit_is_for_one_event_not_for_many() -> None:
    events, _ = decode(b"data: x\n\n" * 100, max_event=32)
    assert len(events) == 100


def test_a_stream_that_never_ends_an_event_is_stopped() -> None:
    decoder = Decoder(max_event=1000)
    with pytest.raises(NodeLost):
        for _ in range(11):
            decoder.feed(b"x" * 100)


def test_a_long_event_in_many_pieces_is_put_together_once() -> None:
    """A quadratic decoder needs minutes for this."""
    piece = b"x" * 1024
    for line_end in (b"\n", b"\r\n"):
        decoder = Decoder()
        decoder.feed(b"event: e" + line_end + b"data: ")
        for _ in range(8 * 1024):
            assert decoder.feed(piece) == []
        (event,) = decoder.feed(line_end * 2)
        assert (event.event, len(event.data)) == ("e", 8 * 2**20)
