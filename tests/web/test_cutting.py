"""Work that is cut ends with words for its client, in whatever phase it is."""

import asyncio
import logging

import pytest

from cortex.web.asgi import EventStream, Response
from cortex.web.service import KEEP_ALIVE_S
from cortex.wire.errors import Busy

STOPPING = Busy("We are stopping.", code="stopping", retry_after=15)


class Work:
    """A handler that goes on until the test lets it end, and notes how it did."""

    def __init__(self, *items, stream=True, keep_alive=None):
        self.items = items
        self.stream = stream
        self.keep_alive = keep_alive
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.how = None
        self.request = None

    async def __call__(self, request):
        self.request = request
        if self.stream:
            return EventStream(
                self.source(), fail=lambda error: b"fail:" + error.code.encode(), keep_alive=self.keep_alive
            )
        return Response(b"".join([item async for item in self.source()]))

    async def source(self):
        try:
            for item in self.items:
                yield item
            self.begun.set()
            await self.go_on.wait()
            yield b"last"
        except (asyncio.CancelledError, GeneratorExit) as error:
            self.how = (type(error), self.request.cut)
            raise


async def test_a_stream_that_is_cut_ends_with_the_error_in_its_shape(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    work = Work(b"data: 1\n\n")
    client = serving(work)
    async with client.open("POST", "/") as exchange:
        await work.begun.wait()
        client.app.cut(STOPPING)
        assert (await exchange.reply()).chunks == [b"data: 1\n\n", b"fail:stopping"]
        await exchange.ended()
    assert work.how == (asyncio.CancelledError, STOPPING)
    assert "outcome=failed" in caplog.text


@pytest.mark.parametrize("stream", [True, False])
async def test_what_is_cut_before_its_first_byte_is_refused(serving, stream):
    work = Work(stream=stream)
    client = serving(work)
    async with client.open("POST", "/") as exchange:
        await work.begun.wait()
        client.app.cut(STOPPING)
        reply = await exchange.reply()
    assert (reply.status, reply.json()["error"]["code"]) == (503, "stopping")
    assert reply.headers["retry-after"] == "15"
    assert work.how == (asyncio.CancelledError, STOPPING)


async def test_a_request_whose_body_has_not_come_is_refused_too(serving):
    work = Work()
    client = serving(work)
    async with client.open("POST", "/", body=None) as exchange:
        exchange.send_body(b"half", more=True)
        for _ in range(3):
            await asyncio.sleep(0)
        client.app.cut(STOPPING)
        assert (await exchange.head())[0] == 503
    assert work.request is None


async def test_a_stream_that_waits_for_its_client_is_cut_and_says_so_when_that_reads_on(serving):
    work = Work(b"data: 1\n\n")
    client = serving(work)
    async with client.open("POST", "/") as exchange:
        await work.begun.wait()
        exchange.stall()
        work.go_on.set()
        for _ in range(3):
            await asyncio.sleep(0)
        client.app.cut(STOPPING)
        await asyncio.sleep(0)
        exchange.resume()
        assert (await exchange.reply()).chunks[-1] == b"fail:stopping"
    assert work.how == (GeneratorExit, STOPPING)


async def test_a_sign_of_life_on_its_way_is_not_torn(serving, clock):
    work = Work(keep_alive=lambda: b": alive\n\n")
    client = serving(work)
    async with client.open("POST", "/") as exchange:
        await work.begun.wait()
        exchange.stall()
        await clock.advance(KEEP_ALIVE_S)
        client.app.cut(STOPPING)
        await asyncio.sleep(0)
        exchange.resume()
        assert (await exchange.reply()).chunks == [b": alive\n\n", b"fail:stopping"]


@pytest.mark.parametrize("first", ["cut", "client"])
async def test_a_client_that_leaves_as_it_is_cut_hears_nothing(serving, caplog, first):
    caplog.set_level(logging.INFO, "cortex.access")
    work = Work(b"data: 1\n\n")
    client = serving(work)
    async with client.open("POST", "/") as exchange:
        await work.begun.wait()
        await exchange.chunk()
        if first == "cut":
            client.app.cut(STOPPING)
            exchange.disconnect()
        else:
            exchange.disconnect()
            for _ in range(2):
                await asyncio.sleep(0)
            client.app.cut(STOPPING)
        await exchange.ended()
    assert "outcome=" in caplog.text
    assert work.how[0] is asyncio.CancelledError


async def test_a_server_that_gives_up_on_what_is_cut_is_obeyed(serving):
    work = Work(b"data: 1\n\n")
    client = serving(work)
    exchange = client.open("POST", "/")
    await work.begun.wait()
    client.app.cut(STOPPING)
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.ended()


async def test_cutting_twice_cuts_once_and_what_has_ended_is_left(serving):
    work = Work(b"data: 1\n\n")
    client = serving(work)
    work.go_on.set()
    assert (await client.post("/")).body == b"data: 1\n\nlast"
    work.go_on.clear()
    work.begun.clear()
    async with client.open("POST", "/") as exchange:
        await work.begun.wait()
        client.app.cut(STOPPING)
        client.app.cut(Busy("Again."))
        assert (await exchange.reply()).body == b"data: 1\n\nfail:stopping"
    assert work.how == (asyncio.CancelledError, STOPPING)


async def test_the_end_of_a_reply_is_not_cut_off(serving):
    work = Work(stream=False)
    work.go_on.set()
    client = serving(work)
    async with client.open("POST", "/") as exchange:
        exchange.stall()
        await work.begun.wait()
        for _ in range(5):
            await asyncio.sleep(0)
        exchange.resume()
        await exchange.head()
        client.app.cut(STOPPING)
        reply = await exchange.reply()
    assert reply.status == 200
