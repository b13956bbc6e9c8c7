"""Bodies of responses: read as h11 reads them, whatever the split, and nothing malformed gets through."""

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cortex.testing import every_split
from cortex.web.body import MAX_LINE, ChunkedBody, MalformedBody, OpenBody, SizedBody, body_reader


def chunked(*parts: bytes, extension: bytes = b"", trailers: bytes = b"") -> bytes:
    body = b"".join(b"%x%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    return body + b"0\r\n" + trailers + b"\r\n"


def by_h11(wire: bytes) -> bytes | None:
    """The payload that h11 finds in a complete chunked body; None if it refuses."""
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="GET", target="/", headers=[("host", "x")]))
    client.send(h11.EndOfMessage())
    client.receive_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + wire)
    payload = b""
    try:
        while True:
            event = client.next_event()
            if isinstance(event, h11.Data):
                payload += event.data
            elif isinstance(event, h11.EndOfMessage):
                return None if client.trailing_data[0] else payload
            elif event is h11.NEED_DATA:
                return None
    except h11.RemoteProtocolError:
        return None


def by_us(pieces: list[bytes]) -> bytes | None:
    reader = ChunkedBody()
    try:
        payload = b"".join([reader.feed(piece) for piece in pieces])
        reader.end()
        if reader.surplus:
            return None
    except MalformedBody:
        return None
    return payload


WIRES = [
    chunked(b"hello"),
    chunked(b"data: 1\n\n", b"data: 2\n\n"),
    chunked(b"\r\n", b"0\r\n\r\n"),
    chunked(b"a" * 17, extension=b";name=value"),
    chunked(b"x", trailers=b"expires: never\r\nx: y\r\n"),
    chunked(),
    b"000A\r\n0123456789\r\n00\r\n\r\n",
]


@pytest.mark.parametrize("wire", WIRES)
def test_every_split_reads_as_h11_reads_the_whole(wire):
    expected = by_h11(wire)
    assert expected is not None
    for pieces in every_split(wire):
        assert by_us(list(pieces)) == expected


@pytest.mark.parametrize(
    "wire",
    [
        b"x\r\n",
        b"\r\n",
        b"-5\r\nhello\r\n",
        b"0x5\r\nhello\r\n0\r\n\r\n",
        b"5\r\nhelloX\r\n0\r\n\r\n",
        b"5\nhello\r\n0\r\n\r\n",
        b"11111111111111111\r\n",
        b"5\r\nhell",
        b"5\r\nhello\r\n",
        b"5\r\nhello\r\n0\r\n",
        b"1;" + b"x" * MAX_LINE + b"\r\n",
        chunked(b"x", trailers=b"t: 1\r\n" * 101),
    ],
)
def test_what_is_malformed_or_cut_is_refused(wire):
    for pieces in ([wire], [wire[at : at + 1] for at in range(len(wire))]):
        assert by_us(pieces) is None


@given(st.lists(st.binary(min_size=1, max_size=40), max_size=6), st.data())
def test_any_chunks_in_any_pieces_come_out_whole(parts, data):
    wire = chunked(*parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(wire)), max_size=6)))
    pieces = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert by_us(pieces) == b"".join(parts)


@given(st.binary(max_size=60))
def test_any_bytes_are_read_as_h11_reads_them_or_refused(wire):
    ours = by_us([wire])
    assert ours is None or ours == by_h11(wire)


def test_bytes_after_the_last_chunk_are_not_payload():
    reader = ChunkedBody()
    assert reader.feed(chunked(b"hello") + b"HTTP/1.1 200 OK\r\n") == b"hello"
    assert (reader.complete, reader.surplus) == (True, True)


def test_a_sized_body_ends_where_it_says():
    reader = SizedBody(5)
    assert (reader.feed(b"hel"), reader.complete) == (b"hel", False)
    assert (reader.feed(b"lo"), reader.complete) == (b"lo", True)
    assert (reader.feed(b"!"), reader.surplus) == (b"", True)
    with pytest.raises(MalformedBody, match="2 bytes before"):
        SizedBody(2).end()


def test_an_open_body_ends_with_the_connection():
    reader = OpenBody()
    assert reader.feed(b"any") == b"any"
    assert not reader.complete
    reader.end()
    assert reader.complete


@pytest.mark.parametrize(
    ("status", "headers", "kind", "complete"),
    [
        (200, {"transfer-encoding": "Chunked"}, ChunkedBody, False),
        (200, {"content-length": "3"}, SizedBody, False),
        (200, {"content-length": "0"}, SizedBody, True),
        (204, {}, SizedBody, True),
        (304, {"content-length": "7"}, SizedBody, True),
        (200, {}, OpenBody, False),
    ],
)
def test_the_head_decides_the_framing(status, headers, kind, complete):
    reader = body_reader("GET", status, headers)
    assert isinstance(reader, kind)
    assert (reader.complete, reader.delimited) == (complete, kind is not OpenBody)
    assert body_reader("HEAD", status, headers).complete
