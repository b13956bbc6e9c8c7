"""Streams: every item is one send, headers wait for the first bytes, errors keep their place."""

import asyncio

import pytest

from cortex.web.asgi import EventStream
from cortex.wire.errors import Busy, NodeLost


def streaming(*items, fail=lambda error: b"fail:" + error.code.encode(), **options):
    """A handler whose source gives the items and raises those that are exceptions."""
    closed = []

    async def source():
        try:
            for item in items:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            closed.append(True)

    async def handler(request):
        return EventStream(source(), fail=fail, **options)

    handler.closed = closed
    return handler


async def test_every_item_is_one_send(serving):
    reply = await serving(streaming(b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n")).post("/")
    assert reply.chunks == [b"data: 1\n\ndata: 2\n\n", b"data: 3\n\n"]
    assert reply.headers["content-type"] == "text/event-stream"
    assert reply.headers["cache-control"] == "no-cache"
    assert "content-length" not in reply.headers


async def test_items_arrive_as_they_are_made(serving):
    turn = asyncio.Semaphore(0)

    async def handler(request):
        async def source():
            for number in range(3):
                await turn.acquire()
                yield b"%d" % number

        return EventStream(source(), fail=lambda error: b"")

    async with serving(handler).open("POST", "/") as exchange:
        for number in range(3):
            turn.release()
            assert await exchange.chunk() == b"%d" % number
        assert await exchange.chunk() is None


async def test_headers_go_out_with_the_first_bytes_and_not_before(serving):
    go_on = asyncio.Event()

    async def handler(request):
        async def source():
            yield b""
            await go_on.wait()
            yield b"data: 1\n\n"

        return EventStream(source(), headers=[("x-a", "1")], fail=lambda error: b"")

    async with serving(handler).open("POST", "/") as exchange:
        head = asyncio.create_task(exchange.head())
        for _ in range(10):
            await asyncio.sleep(0)
        assert not head.done()
        go_on.set()
        assert (await head)[1]["x-a"] == "1"
        assert await exchange.chunk() == b"data: 1\n\n"


async def test_an_error_before_the_first_bytes_is_a_real_status(serving):
    handler = streaming(b"", Busy("full", retry_after=2))
    reply = await serving(handler).post("/")
    assert (reply.status, reply.headers["retry-after"]) == (503, "2")
    assert reply.headers["content-type"] == "application/json"
    assert reply.json()["error"]["code"] == "busy"
    assert handler.closed == [True]


async def test_an_error_after_the_first_bytes_gives_the_last_bytes(serving):
    handler = streaming(b"data: 1\n\n", NodeLost("gone"))
    reply = await serving(handler).post("/")
    assert (reply.status, reply.chunks) == (200, [b"data: 1\n\n", b"fail:node_lost"])
    assert handler.closed == [True]


async def test_a_crash_becomes_an_internal_error_in_either_place(serving, caplog):
    before = await serving(streaming(ValueError("secret"))).post("/")
    assert (before.status, before.json()["error"]["code"]) == (500, "internal_error")
    after = await serving(streaming(b"data: 1\n\n", ValueError("secret"))).post("/")
    assert after.chunks == [b"data: 1\n\n", b"fail:internal_error"]
    assert caplog.text.count("ValueError: secret") == 2
    assert b"secret" not in before.body + after.body


async def test_a_stream_that_cannot_even_fail_is_cut(serving, caplog):
    def broken(error):
        raise RuntimeError("no shape for this")

    async with serving(streaming(b"data: 1\n\n", NodeLost("x"), fail=broken)).open("POST", "/") as exchange:
        with pytest.raises(AssertionError, match="middle of its reply"):
            await exchange.reply()
    assert "no shape for this" in caplog.text


async def test_a_source_without_items_is_an_empty_reply(serving):
    handler = streaming()
    reply = await serving(handler).post("/")
    assert (reply.status, reply.body, handler.closed) == (200, b"", [True])


async def test_a_source_need_not_be_a_generator(serving):
    class Source:
        def __init__(self):
            self.left = [b"1", b"2"]

        def __aiter__(self):
            return self

        async def __anext__(self):
            if not self.left:
                raise StopAsyncIteration
            return self.left.pop(0)

    async def handler(request):
        return EventStream(Source(), fail=lambda error: b"", content_type="text/plain")

    reply = await serving(handler).post("/")
    assert (reply.body, reply.headers["content-type"]) == (b"12", "text/plain")
