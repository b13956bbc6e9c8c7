"""Keep-alives of a stream: only in silence, never inside another send, and real statuses stay possible."""

import asyncio

import pytest

from cortex.testing import AsgiClient, ManualClock
from cortex.web.asgi import EventStream
from cortex.web.service import KEEP_ALIVE_S, Route, Service
from cortex.wire.errors import Busy


class Streaming:
    """A service with one streaming route that the test feeds by hand."""

    def __init__(self):
        self.clock = ManualClock()
        self.items = asyncio.Queue()
        self.closed = asyncio.Event()
        service = Service(
            [Route("GET", "/", self.handle)],
            name="test",
            clock=self.clock,
            call_later=self.clock.call_later,
        )
        self.client = AsgiClient(service)

    async def handle(self, request):
        return EventStream(self.source(), fail=lambda e: b"fail", keep_alive=lambda: b":\n\n")

    async def source(self):
        try:
            while (item := await self.items.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed.set()


async def test_silence_is_filled_every_ten_seconds_and_the_first_sign_brings_the_headers():
    test = Streaming()
    async with test.client.open("GET", "/") as exchange:
        await test.clock.advance(KEEP_ALIVE_S)
        assert (await exchange.head())[0] == 200
        assert await exchange.chunk() == b":\n\n"
        await test.clock.advance(KEEP_ALIVE_S)
        assert await exchange.chunk() == b":\n\n"
        test.items.put_nowait(b"data")
        assert await exchange.chunk() == b"data"
        await test.clock.advance(KEEP_ALIVE_S - 1)
        test.items.put_nowait(None)
        assert await exchange.chunk() is None


async def test_talk_needs_no_signs_of_life():
    test = Streaming()
    async with test.client.open("GET", "/") as exchange:
        for _ in range(5):
            await test.clock.advance(KEEP_ALIVE_S - 1)
            test.items.put_nowait(b"data")
            assert await exchange.chunk() == b"data"
        test.items.put_nowait(None)
        assert await exchange.chunk() is None


async def test_a_refusal_before_the_first_sign_keeps_its_status_and_one_after_it_ends_the_stream():
    test = Streaming()
    async with test.client.open("GET", "/") as exchange:
        await test.clock.advance(KEEP_ALIVE_S - 1)
        test.items.put_nowait(Busy("full"))
        assert (await exchange.reply()).status == 503
    async with test.client.open("GET", "/") as exchange:
        await test.clock.advance(KEEP_ALIVE_S)
        test.items.put_nowait(Busy("full"))
        assert (await exchange.reply()).chunks == [b":\n\n", b"fail"]


@pytest.mark.parametrize("beats", [0, 1])
async def test_a_client_that_leaves_in_silence_ends_source_and_timers(beats):
    test = Streaming()
    async with test.client.open("GET", "/") as exchange:
        await test.clock.advance(KEEP_ALIVE_S * beats)
        exchange.disconnect()
        await exchange.ended()
    await test.closed.wait()
    assert test.clock.pending == 0


async def test_no_sign_is_sent_inside_another_send():
    """What a slow client makes wait is one send, be it a sign or data; never both at once."""
    test = Streaming()
    sending = 0
    most = 0
    app = test.client.app

    async def watched(scope, receive, send):
        async def counted(message):
            nonlocal sending, most
            sending += 1
            most = max(most, sending)
            try:
                await send(message)
            finally:
                sending -= 1

        await app(scope, receive, counted)

    async with AsgiClient(watched).open("GET", "/") as exchange:
        exchange.stall()
        await test.clock.advance(KEEP_ALIVE_S)
        test.items.put_nowait(b"data")
        await test.clock.advance(1)
        exchange.resume()
        assert await exchange.chunk() == b":\n\n"
        exchange.stall()
        await test.clock.advance(KEEP_ALIVE_S * 3)
        exchange.resume()
        test.items.put_nowait(None)
        assert (await exchange.reply()).chunks == [b"data"]
    assert most == 1


async def test_a_client_that_stops_reading_blocks_the_sign_and_is_gone_after_a_minute():
    test = Streaming()
    async with test.client.open("GET", "/") as exchange:
        exchange.stall()
        await test.clock.advance(KEEP_ALIVE_S + 60)
        await test.closed.wait()
