"""A client that leaves, or stops reading, ends the work for it in whatever phase that is."""

import asyncio
import contextlib
import logging

import pytest

from cortex.testing import AsgiClient, ManualClock
from cortex.web.asgi import EventStream, Response
from cortex.web.exchange import STALL_S
from cortex.web.service import Route, Service
from cortex.wire.errors import to_bytes


class Work:
    """A handler that stops wherever it is told to, and notes how it ended."""

    def __init__(self, *, stream=False, items=()):
        self.stream = stream
        self.items = items
        self.begun = asyncio.Event()
        self.go_on = asyncio.Event()
        self.ended = asyncio.Event()
        self.how = ""

    async def __call__(self, request):
        if self.stream:
            return EventStream(self.source(), fail=to_bytes)
        async for _ in self.source():
            pass
        return Response(b"done")

    async def source(self):
        try:
            for item in self.items:
                yield item
            self.begun.set()
            await self.go_on.wait()
            yield b"last"
            self.how = "finished"
        except (asyncio.CancelledError, GeneratorExit) as error:
            self.how = type(error).__name__
            raise
        finally:
            # Cleaning up may take a while, and must not be cut short.
            await asyncio.sleep(0)
            self.ended.set()


async def test_leaving_before_the_body_has_ended_runs_no_handler(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    work = Work()
    async with serving(work).open("POST", "/", body=None) as exchange:
        exchange.send_body(b"half", more=True)
        exchange.disconnect()
        await exchange.ended()
    assert not work.begun.is_set()
    assert "status=0 bytes=0" in caplog.text
    assert "outcome=client_gone" in caplog.text


async def test_leaving_while_the_handler_works_cancels_it(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    work = Work()
    async with serving(work).open("POST", "/") as exchange:
        await work.begun.wait()
        exchange.disconnect()
        await work.ended.wait()
        await exchange.ended()
    assert work.how == "CancelledError"
    assert "outcome=client_gone" in caplog.text


@pytest.mark.parametrize("items", [(), (b"data: 1\n\n",)], ids=["before the first bytes", "after them"])
async def test_leaving_while_a_stream_waits_for_its_source_cancels_it(serving, items):
    work = Work(stream=True, items=items)
    async with serving(work).open("POST", "/") as exchange:
        await work.begun.wait()
        exchange.disconnect()
        await work.ended.wait()
    assert work.how == "CancelledError"


async def test_leaving_while_a_stream_waits_for_the_client_closes_it(serving):
    work = Work(stream=True, items=(b"data: 1\n\n",) * 3)
    async with serving(work).open("POST", "/") as exchange:
        exchange.stall()
        await asyncio.sleep(0)
        exchange.disconnect()
        await work.ended.wait()
    assert not work.begun.is_set()
    assert work.how == "GeneratorExit"


async def test_a_complete_reply_is_never_taken_for_leaving(serving, caplog):
    """The double says `http.disconnect` with the last send, as servers do."""
    caplog.set_level(logging.INFO, "cortex.access")
    for work in (Work(), Work(stream=True, items=(b"data: 1\n\n",))):
        work.go_on.set()
        async with serving(work).open("POST", "/") as exchange:
            await exchange.reply()
            await exchange.ended()
        assert work.how == "finished"
    assert caplog.text.count("outcome=ok") == 2


async def test_a_client_that_takes_nothing_for_a_minute_is_gone(serving, clock, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    work = Work(stream=True, items=(b"data: 1\n\n",) * 3)
    async with serving(work).open("POST", "/") as exchange:
        exchange.stall()
        await clock.advance(STALL_S - 1)
        assert not work.ended.is_set()
        await clock.advance(1)
        await work.ended.wait()
        await exchange.ended()
    assert work.how == "GeneratorExit"
    assert "outcome=client_gone" in caplog.text


async def test_a_client_that_takes_something_now_and_then_is_not_gone(serving, clock):
    items = tuple(b"data: %d\n\n" % number for number in range(5))
    work = Work(stream=True, items=items)
    async with serving(work).open("POST", "/") as exchange:
        exchange.stall()
        for _ in items:
            await clock.advance(STALL_S - 1)
            exchange.resume()
            await asyncio.sleep(0)
            exchange.stall()
        exchange.resume()
        await work.begun.wait()
        assert [await exchange.chunk() for _ in items] == list(items)


async def test_a_silent_source_is_no_stalled_client(serving, clock):
    work = Work(stream=True, items=(b"data: 1\n\n",))
    async with serving(work).open("POST", "/") as exchange:
        await work.begun.wait()
        await clock.advance(STALL_S * 10)
        work.go_on.set()
        assert (await exchange.reply()).chunks == [b"data: 1\n\n", b"last"]


async def test_a_client_that_stops_in_the_middle_of_its_body_is_gone(serving, clock):
    work = Work()
    async with serving(work).open("POST", "/", body=None) as exchange:
        exchange.send_body(b"half", more=True)
        await clock.advance(STALL_S - 1)
        exchange.send_body(b"more", more=True)
        await clock.advance(STALL_S - 1)
        assert not exchange.done
        await clock.advance(1)
        await exchange.ended()
    assert not work.begun.is_set()


async def test_the_same_goes_for_a_whole_reply_that_is_not_taken(serving, clock):
    work = Work()
    work.go_on.set()
    async with serving(work).open("POST", "/") as exchange:
        exchange.stall()
        await clock.advance(STALL_S)
        await exchange.ended()


async def test_a_server_that_stops_cancels_the_handler_and_is_not_taken_for_the_client(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    work = Work()
    exchange = serving(work).open("POST", "/")
    await work.begun.wait()
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.ended()
    assert work.how == "CancelledError"
    assert "outcome=aborted" in caplog.text


async def test_a_server_that_stops_just_as_the_client_leaves_is_obeyed(serving):
    work = Work()
    exchange = serving(work).open("POST", "/")
    await work.begun.wait()
    exchange.disconnect()
    await asyncio.sleep(0)
    exchange.cancel()
    with pytest.raises(asyncio.CancelledError):
        await exchange.ended()
    assert work.how == "CancelledError"


async def test_a_handler_that_swallows_the_cancellation_still_answers_nobody(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    begun = asyncio.Event()
    sent = []

    async def stubborn(request):
        begun.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return Response(b"too late")

    client = serving(stubborn)

    async def app(scope, receive, send):
        async def noted(message):
            sent.append(message)

        await client.app(scope, receive, noted)

    async with AsgiClient(app).open("POST", "/") as exchange:
        await begun.wait()
        exchange.disconnect()
        await exchange.ended()
    assert sent == []
    assert "outcome=client_gone" in caplog.text


async def test_the_task_of_the_server_is_left_uncancelled(serving):
    work = Work()
    client = serving(work)
    counts = []

    async def app(scope, receive, send):
        await client.app(scope, receive, send)
        task = asyncio.current_task()
        counts.append(task.cancelling())
        await asyncio.sleep(0)

    async with AsgiClient(app).open("POST", "/") as exchange:
        await work.begun.wait()
        exchange.disconnect()
        await exchange.ended()
    assert counts == [0]


async def test_a_connection_that_breaks_in_a_send_is_the_client_leaving(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    work = Work(stream=True, items=(b"data: 1\n\n",) * 2)
    client = serving(work)

    async def app(scope, receive, send):
        async def broken(message):
            raise ConnectionResetError

        await client.app(scope, receive, broken)

    async with AsgiClient(app).open("POST", "/") as exchange:
        await exchange.ended()
    assert work.how == "GeneratorExit"
    assert "outcome=client_gone" in caplog.text


async def test_no_timer_is_left_behind(serving, clock):
    for work in (Work(), Work(stream=True, items=(b"x",))):
        work.go_on.set()
        await serving(work).post("/")
    assert clock.pending == 0


async def test_services_without_a_clock_of_their_own_use_the_loop():
    work = Work()
    work.go_on.set()
    reply = await AsgiClient(Service([Route("GET", "/", work)], name="test")).get("/")
    assert reply.body == b"done"


async def test_the_manual_clock_fires_in_order_and_only_what_is_due():
    clock = ManualClock()
    fired = []
    clock.call_later(2, lambda: fired.append((2, clock())))
    clock.call_later(1, lambda: fired.append((1, clock())))
    clock.call_later(1, lambda: fired.append("never")).cancel()
    sleeper = asyncio.create_task(clock.sleep(3))
    await clock.advance(2.5)
    assert fired == [(1, 1001.0), (2, 1002.0)]
    assert not sleeper.done()
    await clock.advance(0.5)
    assert sleeper.done()
