"""The HTTP client against scripted bytes: every framing, every cut, and everything that can break."""

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cortex.testing import every_split
from cortex.web.client import ConnectFailed
from cortex.web.pool import Pool
from cortex.wire.errors import CortexError, Internal, NodeLost, UpstreamTimeout

OK = b"HTTP/1.1 200 OK\r\n"
SIZED = OK + b"content-length: 5\r\nX-A: 1\r\nx-a: 2\r\n\r\nhello"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;ext=1\r\nllo\r\n0\r\n\r\n"
UNTIL_EOF = b"HTTP/1.0 200 OK\r\n\r\nhello"
REUSABLE = "Pool(http://node:80 busy=0 connecting=0 idle=1 waiting=0)"
NOTHING = "Pool()"


@pytest.mark.parametrize("reply", [SIZED, CHUNKED], ids=["content-length", "chunked"])
async def test_a_reply_is_read_however_it_is_cut(pool_over, stream, reply):
    for pieces in every_split(reply):
        pool = pool_over(stream(*pieces))
        async with await pool.request("GET", "http://node:80/x") as answer:
            assert answer.status == 200
            assert await answer.read() == b"hello"
        assert repr(pool) == REUSABLE
        await pool.aclose()


async def test_a_body_without_a_length_ends_with_the_connection(pool_over, stream):
    pool = pool_over(stream(UNTIL_EOF, b""))
    async with await pool.request("GET", "http://node:80/") as answer:
        assert await answer.read() == b"hello"
    assert repr(pool) == NOTHING


async def test_what_one_read_delivered_is_one_chunk(pool_over, stream):
    head = OK + b"transfer-encoding: chunked\r\n\r\n"
    pool = pool_over(stream(head, b"2\r\nab\r\n2\r\ncd\r\n", b"1\r\ne\r\n3\r\nf", b"gh\r\n0\r\n", b"\r\n"))
    async with await pool.request("GET", "http://node:80/") as answer:
        assert [chunk async for chunk in answer.chunks()] == [b"abcd", b"ef", b"gh"]
    assert repr(pool) == REUSABLE


async def test_headers_are_lower_case_and_the_first_value_counts(pool_over, stream):
    async with await pool_over(stream(SIZED)).request("GET", "http://node/") as answer:
        assert answer.headers == {"content-length": "5", "x-a": "1"}


@pytest.mark.parametrize("head", [b"100 Continue", b"103 Early Hints"])
async def test_informational_replies_are_passed_over(pool_over, stream, head):
    pool = pool_over(stream(b"HTTP/1.1 " + head + b"\r\n\r\n", b"HTTP/1.1 102 Wait\r\n\r\n" + SIZED))
    async with await pool.request("GET", "http://node:80/") as answer:
        assert (answer.status, await answer.read()) == (200, b"hello")


@pytest.mark.parametrize("reply", [b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\n\r\n"])
async def test_replies_without_a_body_leave_the_connection_usable(pool_over, stream, reply):
    pool = pool_over(stream(reply))
    async with await pool.request("GET", "http://node:80/") as answer:
        assert await answer.read() == b""
    assert repr(pool) == REUSABLE


async def test_the_reply_to_head_has_no_body(pool_over, stream):
    pool = pool_over(stream(OK + b"content-length: 5\r\n\r\n"))
    async with await pool.request("HEAD", "http://node:80/") as answer:
        assert await answer.read() == b""
    assert repr(pool) == REUSABLE


async def test_a_request_is_sent_whole_and_in_one_piece(pool_over, stream):
    there = stream(SIZED)
    headers = [("authorization", "Bearer k"), ("content-type", "application/json")]
    async with await pool_over(there).request("POST", "http://node:81/a?b=c", headers=headers, body=b"{}"):
        pass
    assert there.written == (
        b"POST /a?b=c HTTP/1.1\r\nHost: node:81\r\nauthorization: Bearer k\r\n"
        b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
    ).replace(b"Host", b"host")


async def test_a_body_can_be_sent_chunked(pool_over, stream):
    there = stream(SIZED)
    headers = [("transfer-encoding", "chunked")]
    async with await pool_over(there).request("POST", "http://node/", headers=headers, body=b"x" * 17):
        pass
    assert there.written.endswith(b"\r\n\r\n11\r\n" + b"x" * 17 + b"\r\n0\r\n\r\n")


async def test_an_empty_post_has_a_length_and_a_get_none(pool_over, stream):
    post, get = stream(SIZED), stream(SIZED)
    async with await pool_over(post).request("POST", "http://node/"):
        pass
    async with await pool_over(get).request("GET", "http://node/"):
        pass
    assert b"content-length: 0" in post.written
    assert b"content-length" not in get.written


async def test_a_large_body_is_sent_too(pool_over, stream):
    there = stream(SIZED)
    body = bytes(range(256)) * 1024
    async with await pool_over(there).request("POST", "http://node/", body=body):
        pass
    assert there.written.endswith(b"\r\n\r\n" + body)


@pytest.mark.parametrize(
    ("reads", "says"),
    [
        ([b""], "closed the connection without an answer"),
        ([OK, b""], "broke off its answer"),
        ([b"HTTP/1.1 200", b""], "broke off its answer"),
        ([b"SSH-2.0-OpenSSH_9.6\r\n"], "no HTTP"),
        ([b"\x16\x03\x01\x02\x00\x01"], "no HTTP"),
        ([b"x" * 70_000], "no HTTP"),
        ([b"HTTP/1.1 200 OK\r\n" + b"a: " + b"x" * 70_000], "no HTTP"),
        ([b"HTTP/1.1 101 Switching\r\n\r\n"], "no HTTP"),
        ([ConnectionResetError(104, "Connection reset by peer")], "Connection reset by peer"),
        ([OK, OSError(5, "Input/output error")], "Input/output error"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_no_proper_head_is_a_lost_node(pool_over, stream, reads, says):
    there = stream(*reads)
    pool = pool_over(there)
    with pytest.raises(NodeLost, match=says) as caught:
        await pool.request("POST", "http://node:80/", body=b"{}")
    assert "http://node:80" in caught.value.message
    assert (type(caught.value), caught.value.status) == (NodeLost, 502)
    assert there.closed
    assert repr(pool) == NOTHING


@pytest.mark.parametrize(
    ("body", "end"),
    [
        (b"content-length: 9\r\n\r\nhello", b""),
        (b"content-length: 9\r\n\r\nhello", ConnectionResetError(104, "Connection reset by peer")),
        (b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", b""),
        (b"transfer-encoding: chunked\r\n\r\n9\r\nhello", b""),
        (b"transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n", b"garbage\r\n"),
        (b"transfer-encoding: chunked\r\n\r\n5\r\nhello", b"!!"),
    ],
)
async def test_a_body_that_is_cut_gives_what_came_and_then_the_error(pool_over, stream, body, end):
    there = stream(OK + body, end)
    pool = pool_over(there)
    got = []
    with pytest.raises(NodeLost, match="http://node:80"):
        async with await pool.request("GET", "http://node:80/") as answer:
            async for chunk in answer.chunks():
                got.append(chunk)
    assert got == [b"hello"]
    assert there.closed
    assert repr(pool) == NOTHING


async def test_a_body_over_the_limit_is_not_read_to_its_end(pool_over, stream):
    there = stream(OK + b"content-length: 50\r\n\r\n" + b"x" * 40)
    pool = pool_over(there)
    async with await pool.request("GET", "http://node/") as answer:
        with pytest.raises(NodeLost, match="larger than 30 bytes"):
            await answer.read(limit=30)
    assert there.closed
    assert repr(pool) == NOTHING


@pytest.mark.parametrize(
    "reply",
    [
        OK + b"connection: close\r\ncontent-length: 2\r\n\r\nok",
        b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok",
        SIZED + b"surplus",
        CHUNKED + b"surplus",
        b"HTTP/1.1 204 No Content\r\n\r\nsurplus",
    ],
    ids=[
        "connection: close",
        "HTTP/1.0",
        "surplus after a length",
        "surplus after chunks",
        "surplus after nothing",
    ],
)
async def test_a_connection_that_cannot_be_trusted_is_not_reused(pool_over, stream, reply):
    there = stream(reply)
    pool = pool_over(there)
    async with await pool.request("GET", "http://node/") as answer:
        assert await answer.read() in (b"ok", b"hello", b"")
    assert there.closed
    assert repr(pool) == NOTHING


async def test_a_reply_before_the_request_was_taken_is_read_and_ends_the_connection(pool_over, stream):
    there = stream(b"HTTP/1.1 413 Too Large\r\ncontent-length: 0\r\n\r\n")
    there.taken = False
    pool = pool_over(there)
    async with await pool.request("POST", "http://node/", body=b"x" * 1000) as answer:
        assert (answer.status, await answer.read()) == (413, b"")
    assert there.closed
    assert repr(pool) == NOTHING


@pytest.mark.parametrize("at", ["head", "body"])
async def test_silence_is_a_timeout_wherever_it_falls(pool_over, stream, clock, at):
    there = stream() if at == "head" else stream(OK + b"content-length: 5\r\n\r\nhe")
    pool = pool_over(there, idle_timeout=30.0)

    async def ask():
        async with await pool.request("GET", "http://node:80/") as answer:
            await answer.read()

    asking = asyncio.create_task(ask())
    await clock.advance(29.0)
    assert not asking.done()
    await clock.advance(1.0)
    with pytest.raises(UpstreamTimeout, match=r"http://node:80 was silent for 30 s"):
        await asking
    assert there.closed
    assert repr(pool) == NOTHING
    assert clock.pending == 0


async def test_a_slow_reply_that_never_falls_silent_is_no_timeout(pool_over, stream, clock):
    there = stream(OK + b"content-length: 5\r\n\r\n")
    pool = pool_over(there)

    async def ask():
        async with await pool.request("GET", "http://node/", idle_timeout=10.0) as answer:
            return await answer.read()

    asking = asyncio.create_task(ask())
    for byte in b"hello":
        await clock.advance(9.0)
        there.feed(bytes([byte]))
    assert await asking == b"hello"


async def test_silence_is_borne_as_long_as_somebody_vouches_for_the_peer(pool_over, stream, clock):
    alive = True
    pool = pool_over(stream(), idle_timeout=30.0)
    asking = asyncio.create_task(pool.request("GET", "http://node/", is_alive=lambda: alive))
    await clock.advance(480.0)
    assert not asking.done()
    alive = False
    await clock.advance(29.0)
    assert not asking.done()
    await clock.advance(1.0)
    with pytest.raises(UpstreamTimeout):
        await asking


async def test_a_long_upload_that_goes_on_is_no_timeout(pool_over, stream, clock):
    there = stream()
    there.taken = False
    pool = pool_over(there, idle_timeout=10.0)
    asking = asyncio.create_task(pool.request("POST", "http://node/", body=b"x" * 1000))
    for _ in range(5):
        await clock.advance(9.0)
        there.written = there.written[100:]
    await clock.advance(9.0)
    assert not asking.done()
    await clock.advance(10.0)
    with pytest.raises(UpstreamTimeout):
        await asking


async def test_the_timeout_of_one_request_does_not_outlive_it(pool_over, stream, clock):
    there = stream(SIZED)
    pool = pool_over(there, idle_timeout=300.0, keepalive_expiry=60.0)
    async with await pool.request("GET", "http://node/") as answer:
        await answer.read()
    asking = asyncio.create_task(pool.request("GET", "http://node/", idle_timeout=2.0))
    await clock.advance(2.0)
    with pytest.raises(UpstreamTimeout, match="2 s"):
        await asking


@pytest.mark.parametrize(
    ("url", "method", "headers"),
    [
        ("ftp://node/", "GET", []),
        ("http:///x", "GET", []),
        ("http://node:99999/", "GET", []),
        ("node:80", "GET", []),
        ("http://node/a b", "GET", []),
        ("http://node/", "GE T", []),
        ("http://node/", "GET", [("a", "b\r\nc: d")]),
        ("http://node/é", "GET", []),
    ],
)
async def test_what_cannot_be_sent_is_our_own_fault_and_opens_nothing(
    pool_over, stream, url, method, headers
):
    pool = pool_over(stream())
    with pytest.raises(Internal):
        await pool.request(method, url, headers=headers)
    assert pool.network.opened == []
    assert repr(pool) == NOTHING


@pytest.mark.parametrize(
    "failure",
    [ConnectionRefusedError(111, "Connection refused"), OSError("no route"), UnicodeError("label too long")],
)
async def test_a_connection_that_does_not_come_about_says_so(pool_over, failure):
    pool = pool_over(failure)
    with pytest.raises(ConnectFailed, match="Cannot connect to http://node:80: ") as caught:
        await pool.request("GET", "http://node:80/")
    assert str(failure.args[-1]) in caught.value.message
    assert repr(pool) == NOTHING


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=80) | st.binary(max_size=40).map(lambda tail: OK + tail), cut=st.integers(0, 80)
)
async def test_whatever_a_node_sends_is_a_reply_or_our_error(stream, data, cut):
    streams = [stream(*filter(None, (data[:cut], data[cut:])), b"")]

    async def connect(host, port, context):
        return streams.pop()

    pool = Pool(connect=connect)
    try:
        async with await pool.request("GET", "http://node/") as answer:
            await answer.read()
    except CortexError as error:
        assert isinstance(error, NodeLost)
    await pool.aclose()
    assert repr(pool) == NOTHING
