"""The pool: reuse, its bound and its queue, what is sent twice and what never, and that nothing leaks."""

import asyncio

import pytest

from cortex.testing import memory_connect
from cortex.web.asgi import EventStream, Response
from cortex.web.client import ConnectFailed
from cortex.web.listener import KEEP_ALIVE_S
from cortex.web.pool import KEEPALIVE_EXPIRY, Pool
from cortex.web.service import Route, Service
from cortex.wire.errors import NodeLost

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
NODE = "http://node:80"
NOTHING = "Pool()"


def state(busy=0, connecting=0, idle=0, waiting=0):
    return f"Pool({NODE} busy={busy} connecting={connecting} idle={idle} waiting={waiting})"


async def ask(pool, url=NODE + "/"):
    async with await pool.request("POST", url, body=b"{}") as reply:
        return await reply.read()


async def ask_at_once(pool, number):
    """So that each request has a connection of its own."""
    for reply in [await pool.request("GET", NODE + "/") for _ in range(number)]:
        await reply.read()


async def settle():
    for _ in range(10):
        await asyncio.sleep(0)


# --- reuse ----------------------------------------------------------------------------------------


async def test_a_connection_is_used_again(pool_over, stream):
    there = stream(answers=[OK, OK, OK])
    pool = pool_over(there)
    for _ in range(3):
        assert await ask(pool) == b"ok"
        assert repr(pool) == state(idle=1)
    assert len(pool.network.opened) == 1


async def test_the_connection_is_free_as_soon_as_the_body_has_ended(pool_over, stream):
    pool = pool_over(stream(OK))
    async with await pool.request("GET", NODE + "/") as reply:
        assert repr(pool) == state(busy=1)
        await reply.read()
        assert repr(pool) == state(idle=1)
    assert repr(pool) == state(idle=1)


async def test_a_reply_that_is_not_read_to_its_end_closes_the_connection(pool_over, stream):
    there = stream(OK)
    pool = pool_over(there)
    async with await pool.request("GET", NODE + "/"):
        pass
    assert there.closed
    assert repr(pool) == NOTHING


async def test_origins_do_not_share_connections(pool_over, stream):
    pool = pool_over(stream(OK), stream(OK), stream(OK))
    await ask(pool, "http://a:1/")
    await ask(pool, "http://a:2/")
    await ask(pool, "https://a:1/")
    assert pool.network.opened == [("a", 1, False), ("a", 2, False), ("a", 1, True)]


async def test_default_ports_follow_the_scheme(pool_over, stream):
    pool = pool_over(stream(OK), stream(OK))
    await ask(pool, "http://a/")
    await ask(pool, "https://[::1]/")
    assert pool.network.opened == [("a", 80, False), ("::1", 443, True)]


async def test_the_connection_used_last_is_used_first_so_that_the_others_can_go(pool_over, stream):
    first, second = stream(OK), stream(answers=[OK, OK])
    pool = pool_over(first, second)
    await ask_at_once(pool, 2)
    await ask(pool)
    assert (first.writes, second.writes) == (1, 2)


async def test_an_idle_connection_is_closed_after_a_while(pool_over, stream, clock):
    first, second = stream(OK), stream(OK)
    pool = pool_over(first, second, keepalive_expiry=4.0)
    await ask_at_once(pool, 2)
    assert repr(pool) == state(idle=2)
    await clock.advance(3.9)
    assert not first.closed
    await clock.advance(0.1)
    assert first.closed
    assert second.closed
    assert repr(pool) == NOTHING
    assert clock.pending == 0


async def test_each_idle_connection_has_its_own_time(pool_over, stream, clock):
    first, second = stream(OK), stream(OK)
    pool = pool_over(first, second, keepalive_expiry=4.0)
    await ask(pool, "http://a/")
    await clock.advance(2.0)
    await ask(pool, "http://b/")
    await clock.advance(2.0)
    assert (first.closed, second.closed) == (True, False)
    await clock.advance(2.0)
    assert second.closed


def test_we_drop_idle_connections_before_our_servers_do():
    assert KEEPALIVE_EXPIRY < KEEP_ALIVE_S


# --- what is sent twice, and what never -----------------------------------------------------------


async def test_a_reused_connection_that_has_ended_is_replaced_before_anything_is_sent(pool_over, stream):
    stale, fresh = stream(OK), stream(OK)
    pool = pool_over(stale, fresh)
    await ask(pool)
    stale.noisy = True
    sent = stale.writes
    assert await ask(pool) == b"ok"
    assert stale.writes == sent
    assert stale.closed
    assert repr(pool) == state(idle=1)


async def test_a_reused_connection_that_refuses_the_write_is_replaced(pool_over, stream):
    stale, fresh = stream(OK), stream(OK)
    pool = pool_over(stale, fresh)
    await ask(pool)
    stale.write = lambda *data: (_ for _ in ()).throw(ConnectionResetError("closed"))
    assert await ask(pool) == b"ok"
    assert stale.closed
    assert repr(pool) == state(idle=1)


async def test_all_stale_connections_are_passed_over(pool_over, stream):
    stale = [stream(OK), stream(OK), stream(OK)]
    pool = pool_over(*stale, stream(OK))
    await ask_at_once(pool, 3)
    for connection in stale:
        connection.noisy = True
    assert await ask(pool) == b"ok"
    assert repr(pool) == state(idle=1)


@pytest.mark.parametrize("end", [b"", ConnectionResetError(104, "reset")])
async def test_nothing_is_sent_twice_once_a_reused_connection_has_taken_it(pool_over, stream, end):
    reused, other = stream(OK), stream(OK)
    pool = pool_over(reused, other)
    await ask(pool)
    reused.answers.append(end)
    with pytest.raises(NodeLost) as caught:
        await ask(pool)
    assert not isinstance(caught.value, ConnectFailed)
    assert other.writes == 0
    assert repr(pool) == NOTHING


async def test_a_fresh_connection_that_closes_at_once_is_a_failed_connect(pool_over, stream):
    there = stream()
    there.close()
    with pytest.raises(ConnectFailed, match="at once"):
        await ask(pool_over(there))


# --- the bound and the queue ----------------------------------------------------------------------


async def test_requests_over_the_bound_wait_their_turn(pool_over, stream):
    streams = [stream(answers=[OK] * 9), stream(answers=[OK] * 9)]
    pool = pool_over(*streams, per_host=2)
    held = [await pool.request("GET", NODE + "/") for _ in range(2)]
    order = []

    async def wait(name):
        reply = await pool.request("GET", NODE + "/")
        order.append(name)
        await reply.read()

    waiting = [asyncio.create_task(wait(name)) for name in "abc"]
    await settle()
    assert repr(pool) == state(busy=2, waiting=3)
    await held[0].read()
    await asyncio.gather(*waiting)
    assert order == ["a", "b", "c"]
    assert len(pool.network.opened) == 2
    await held[1].aclose()
    assert repr(pool) == state(idle=1)


async def test_a_place_is_passed_on_when_its_connection_is_not_reusable(pool_over, stream):
    pool = pool_over(stream(OK), stream(OK), per_host=1)
    held = await pool.request("GET", NODE + "/")
    waiting = asyncio.create_task(ask(pool))
    await settle()
    await held.aclose()
    assert await waiting == b"ok"
    assert len(pool.network.opened) == 2


async def test_a_newcomer_does_not_overtake_a_waiter_that_was_just_called(pool_over, stream):
    pool = pool_over(stream(answers=[OK] * 3), per_host=1)
    order = []

    async def wait(name):
        await ask(pool)
        order.append(name)

    held = await pool.request("GET", NODE + "/")
    first = asyncio.create_task(wait("first"))
    await settle()
    await held.read()
    await asyncio.gather(wait("newcomer"), first)
    assert order == ["first", "newcomer"]


# --- cancellation, in each phase ------------------------------------------------------------------


async def cancelled(task):
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_waiting_for_a_place(pool_over, stream):
    pool = pool_over(stream(OK), per_host=1)
    held = await pool.request("GET", NODE + "/")
    waiting = asyncio.create_task(ask(pool))
    await settle()
    await cancelled(waiting)
    assert repr(pool) == state(busy=1)
    await held.read()
    assert repr(pool) == state(idle=1)


async def test_cancelled_in_the_moment_in_which_the_place_is_granted(pool_over, stream):
    pool = pool_over(stream(answers=[OK, OK]), per_host=1)
    held = await pool.request("GET", NODE + "/")
    first, second = (asyncio.create_task(ask(pool)) for _ in range(2))
    await settle()
    await held.read()
    await cancelled(first)
    assert await second == b"ok"
    assert repr(pool) == state(idle=1)


async def test_cancelled_while_connecting(pool_over, stream):
    pool = pool_over(stream(OK))
    pool.network.gate = asyncio.Event()
    asking = asyncio.create_task(ask(pool))
    await settle()
    assert repr(pool) == state(connecting=1)
    await cancelled(asking)
    assert repr(pool) == NOTHING


async def test_cancelled_while_waiting_for_the_head(pool_over, stream, clock):
    there = stream()
    pool = pool_over(there)
    asking = asyncio.create_task(ask(pool))
    await settle()
    assert repr(pool) == state(busy=1)
    await cancelled(asking)
    assert there.closed
    assert repr(pool) == NOTHING
    assert clock.pending == 0


async def test_cancelled_while_reading_the_body(pool_over, stream, clock):
    there = stream(OK[:-1])
    pool = pool_over(there)
    asking = asyncio.create_task(ask(pool))
    await settle()
    await cancelled(asking)
    assert there.closed
    assert repr(pool) == NOTHING
    assert clock.pending == 0


async def test_a_connect_that_takes_too_long_is_given_up(pool_over, stream):
    pool = pool_over(stream(OK), connect_timeout=0.01)
    pool.network.gate = asyncio.Event()
    with pytest.raises(ConnectFailed, match=r"within 0\.01 s"):
        await ask(pool)
    assert repr(pool) == NOTHING


# --- abort and close ------------------------------------------------------------------------------


async def test_abort_breaks_every_connection_to_one_origin(pool_over, stream):
    streams = [stream(OK), stream(), stream(OK[:-1]), stream(OK), stream()]
    *here, elsewhere = streams
    pool = pool_over(*streams)
    waiting = []
    held = await pool.request("GET", NODE + "/")
    for url in (NODE, NODE):
        waiting.append(asyncio.create_task(ask(pool, url)))
        await settle()
    await ask(pool)
    other = asyncio.create_task(ask(pool, "http://other/"))
    await settle()
    assert repr(pool) == f"{state(busy=3, idle=1)[:-1]}, http://other busy=1 connecting=0 idle=0 waiting=0)"
    pool.abort(NODE, "The node is gone.")
    for lost in (*waiting, held.read()):
        with pytest.raises(NodeLost, match=r"The node is gone\."):
            await lost
    await held.aclose()
    assert all(there.closed for there in here)
    assert not elsewhere.closed
    await cancelled(other)
    assert repr(pool) == NOTHING


async def test_abort_is_seen_by_who_reads_later(pool_over, stream):
    pool = pool_over(stream(OK))
    async with await pool.request("GET", NODE + "/") as reply:
        pool.abort(NODE, "The node is gone.")
        with pytest.raises(NodeLost, match="gone"):
            [chunk async for chunk in reply.chunks()]
    pool.abort(NODE, "Again.")
    assert repr(pool) == NOTHING


async def test_an_aborted_connection_is_not_kept_even_if_its_reply_is_complete(pool_over, stream):
    pool = pool_over(stream(b"HTTP/1.1 204 No Content\r\n\r\n"))
    async with await pool.request("GET", NODE + "/"):
        pool.abort(NODE, "The node is gone.")
    assert repr(pool) == NOTHING


async def test_after_an_abort_the_origin_can_be_asked_again(pool_over, stream):
    pool = pool_over(stream(OK), stream(OK))
    await ask(pool)
    pool.abort(NODE, "The node is gone.")
    assert await ask(pool) == b"ok"


async def test_closing_ends_everything(pool_over, stream, clock):
    streams = [stream(OK), stream()]
    pool = pool_over(*streams, per_host=2)
    await ask(pool)
    busy = [asyncio.create_task(ask(pool)) for _ in range(2)]
    await settle()
    queued = asyncio.create_task(ask(pool))
    await settle()
    await pool.aclose()
    for task in (*busy, queued):
        with pytest.raises(NodeLost, match="has been closed"):
            await task
    with pytest.raises(ConnectFailed, match="has been closed"):
        await ask(pool)
    assert len(pool.network.opened) == 2
    assert all(there.closed for there in streams)
    assert repr(pool) == NOTHING
    assert clock.pending == 0


async def test_closing_fails_who_waits_even_if_nobody_lets_go(pool_over, stream):
    pool = pool_over(stream(OK), per_host=1)
    held = await pool.request("GET", NODE + "/")
    queued = asyncio.create_task(ask(pool))
    await settle()
    await pool.aclose()
    with pytest.raises(ConnectFailed, match="closed"):
        await queued
    await held.aclose()
    assert repr(pool) == NOTHING


async def test_a_connection_that_comes_about_after_closing_is_closed(pool_over, stream):
    there = stream(OK)
    pool = pool_over(there)
    pool.network.gate = asyncio.Event()
    asking = asyncio.create_task(ask(pool))
    await settle()
    await pool.aclose()
    pool.network.gate.set()
    with pytest.raises(ConnectFailed, match="closed"):
        await asking
    assert there.closed
    assert there.writes == 0
    assert repr(pool) == NOTHING


# --- over a network in memory ---------------------------------------------------------------------


class Node:
    """A service with one handler that notes when it is left."""

    def __init__(self):
        self.left = asyncio.Event()
        self.arrived = asyncio.Event()
        self.go_on = asyncio.Event()
        routes = [Route("POST", "/echo", self.echo), Route("GET", "/stream", self.stream)]
        self.app = Service(routes, name="node")

    async def echo(self, request):
        return Response(await request.body())

    async def stream(self, request):
        async def source():
            try:
                yield b"data: 1\n\n"
                self.arrived.set()
                await self.go_on.wait()
                yield b"data: 2\n\n"
            finally:
                self.left.set()

        return EventStream(source(), fail=lambda error: b"")


@pytest.fixture
async def network():
    node = Node()
    memory = memory_connect({NODE: node.app})
    memory.node = node
    yield memory
    await memory.aclose()


@pytest.fixture
async def pool(network):
    pool = Pool(connect=network)
    yield pool
    await pool.aclose()


async def test_a_large_body_goes_there_and_back(pool):
    body = bytes(range(256)) * 4096
    async with await pool.request("POST", NODE + "/echo", body=body) as reply:
        assert await reply.read() == body


async def test_a_stream_arrives_as_it_is_made(pool, network):
    async with await pool.request("GET", NODE + "/stream") as reply:
        chunks = reply.chunks()
        assert await anext(chunks) == b"data: 1\n\n"
        network.node.go_on.set()
        assert [chunk async for chunk in chunks] == [b"data: 2\n\n"]
    assert repr(pool) == state(idle=1)


async def test_who_leaves_a_reply_leaves_the_handler(pool, network):
    async with await pool.request("GET", NODE + "/stream") as reply:
        await anext(reply.chunks())
    await network.node.left.wait()
    assert repr(pool) == NOTHING


async def test_a_killed_host_breaks_its_connections_and_refuses_new_ones(pool, network):
    async with await pool.request("GET", NODE + "/stream") as reply:
        chunks = reply.chunks()
        await anext(chunks)
        await network.node.arrived.wait()
        network.kill(NODE)
        with pytest.raises(NodeLost, match="reset"):
            await anext(chunks)
    await network.node.left.wait()
    with pytest.raises(ConnectFailed, match="refused"):
        await pool.request("POST", NODE + "/echo", body=b"x")
    assert network.connections(NODE) == 0
    network.revive(NODE)
    async with await pool.request("POST", NODE + "/echo", body=b"x") as reply:
        assert await reply.read() == b"x"


async def test_an_abort_gives_its_reason_to_who_is_reading(pool, network):
    async with await pool.request("GET", NODE + "/stream") as reply:
        chunks = reply.chunks()
        await anext(chunks)
        reading = asyncio.create_task(anext(chunks))
        await settle()
        pool.abort(NODE, "Three polls were missed.")
        with pytest.raises(NodeLost, match="Three polls"):
            await reading
    await network.node.left.wait()


async def test_a_hanging_host_takes_requests_and_answers_when_it_wakes(pool, network):
    network.hang(NODE)
    asking = asyncio.create_task(ask(pool, NODE + "/echo"))
    await settle()
    assert not asking.done()
    network.revive(NODE)
    assert await asking == b"{}"


async def test_an_address_without_a_host_is_refused(pool):
    with pytest.raises(ConnectFailed, match="refused"):
        await pool.request("GET", "http://nobody:1/")
