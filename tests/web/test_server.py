"""Real sockets: the server under our services, and our client against it."""

import asyncio
import contextlib
import logging
import socket

import pytest
import uvloop

from cortex.web.asgi import EventStream, Response
from cortex.web.pool import Pool
from cortex.web.server import BindError, serve
from cortex.web.service import Route, Service
from cortex.wire.errors import Busy, NodeLost


class Node:
    """A service whose stream is led by the test."""

    def __init__(self, **options):
        self.turn = asyncio.Semaphore(0)
        self.begun = asyncio.Event()
        self.ended = asyncio.Event()
        self.how = ""
        routes = [
            Route("POST", "/echo", self.echo),
            Route("POST", "/stream", self.stream),
            Route("POST", "/work", self.work),
        ]
        self.app = Service(routes, name="node", **options)

    async def echo(self, request):
        return Response(await request.body(), headers=[("x-path", request.path)])

    async def stream(self, request):
        return EventStream(self.events(), fail=lambda error: b"data: %b\n\n" % error.code.encode())

    async def work(self, request):
        return Response(b"".join([event async for event in self.events()]))

    async def events(self):
        try:
            for number in range(3):
                self.begun.set()
                await self.turn.acquire()
                yield b"data: %d\n\n" % number
            self.how = "finished"
        except asyncio.CancelledError:
            self.how = "cancelled"
            raise
        finally:
            self.ended.set()


@contextlib.asynccontextmanager
async def running(*apps, drain_s=5.0, on_stop=None, cut=None):
    """The apps on ports of their own; gives their URLs, the event that stops them, and the server's task."""
    stop = asyncio.Event()
    ready = asyncio.get_running_loop().create_future()
    listeners = [("127.0.0.1:0", app) for app in apps]
    server = asyncio.create_task(
        serve(listeners, stop=stop, on_ready=ready.set_result, on_stop=on_stop, cut=cut, drain_s=drain_s)
    )
    try:
        addresses = await ready
        yield [f"http://{address}" for address in addresses], stop, server
    finally:
        stop.set()
        await server


@pytest.fixture
async def pool():
    pool = Pool()
    yield pool
    await pool.aclose()


async def post(pool, url, body=b"", **options):
    async with await pool.request("POST", url, body=body, **options) as reply:
        return reply.status, await reply.read()


async def test_requests_are_served_over_one_kept_connection(pool):
    async with running(Node().app) as ((url,), _, _):
        for number in range(3):
            assert await post(pool, url + "/echo", b"%d" % number) == (200, b"%d" % number)
        assert "idle=1" in repr(pool)


async def test_several_listeners_each_serve_their_own(pool):
    def app(name):
        async def handler(request):
            return Response(name)

        return Service([Route("POST", "/", handler)], name="test")

    async with running(app(b"a"), app(b"b")) as (urls, _, _):
        assert [await post(pool, url) for url in urls] == [(200, b"a"), (200, b"b")]


async def test_a_large_body_goes_there_and_back(pool):
    body = bytes(range(256)) * 4096 * 4
    async with running(Node().app) as ((url,), _, _):
        assert await post(pool, url + "/echo", body) == (200, body)
        chunked = [("transfer-encoding", "chunked")]
        assert await post(pool, url + "/echo", body, headers=chunked) == (200, body)


@pytest.mark.parametrize("headers", [[], [("transfer-encoding", "chunked")]], ids=["sized", "chunked"])
async def test_a_body_over_the_cap_is_413_and_the_client_gets_to_read_it(pool, headers):
    async with running(Node(body_cap=1_000_000).app) as ((url,), _, _):
        status, body = await post(pool, url + "/echo", b"x" * 1_900_000, headers=headers)
        assert status == 413
        assert b"larger than 1000000 bytes" in body
        assert await post(pool, url + "/echo", b"y") == (200, b"y")


async def test_a_body_far_over_the_cap_ends_with_the_connection():
    node = Node(body_cap=1000)
    async with running(node.app) as ((url,), _, _):
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /echo HTTP/1.1\r\nhost: x\r\ncontent-length: 50000000\r\n\r\n" + b"x" * 3_000_000)
        assert await reader.readuntil(b"}}")
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        writer.close()
        with contextlib.suppress(ConnectionResetError):
            await writer.wait_closed()


async def test_events_arrive_as_they_are_produced(pool):
    node = Node()
    async with running(node.app) as ((url,), _, _):
        asking = asyncio.create_task(pool.request("POST", url + "/stream"))
        node.turn.release()
        async with await asking as reply:
            chunks = reply.chunks()
            assert await anext(chunks) == b"data: 0\n\n"
            assert not node.ended.is_set()
            for number in (1, 2):
                node.turn.release()
                assert await anext(chunks) == b"data: %d\n\n" % number
            assert [chunk async for chunk in chunks] == []
        assert reply.headers["content-type"] == "text/event-stream"


@pytest.mark.parametrize("path", ["/stream", "/work"])
async def test_a_client_that_leaves_is_noticed_before_the_first_byte(pool, path):
    node = Node()
    async with running(node.app) as ((url,), _, _):
        asking = asyncio.create_task(pool.request("POST", url + path))
        await node.begun.wait()
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        await node.ended.wait()
        assert node.how == "cancelled"


async def test_a_client_that_leaves_a_stream_is_noticed(pool):
    node = Node()
    async with running(node.app) as ((url,), _, _):
        node.turn.release()
        async with await pool.request("POST", url + "/stream") as reply:
            await anext(reply.chunks())
        await node.ended.wait()
        assert node.how == "cancelled"


async def test_a_client_that_leaves_in_the_middle_of_its_body_starts_nothing(caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    logged = asyncio.Event()
    logging.getLogger("cortex.access.node").addFilter(noted := lambda record: logged.set() or True)
    node = Node()
    async with running(node.app) as ((url,), _, _):
        host, port = url.removeprefix("http://").split(":")
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /work HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        await logged.wait()
    logging.getLogger("cortex.access.node").removeFilter(noted)
    assert "outcome=client_gone" in caplog.text
    assert not node.begun.is_set()


async def test_stopping_lets_running_requests_end(pool):
    node = Node()
    async with running(node.app) as ((url,), stop, server):
        node.turn.release()
        async with await pool.request("POST", url + "/stream") as reply:
            chunks = reply.chunks()
            await anext(chunks)
            stop.set()
            await asyncio.sleep(0)
            node.turn.release()
            assert await anext(chunks) == b"data: 1\n\n"
            node.turn.release()
            assert [chunk async for chunk in chunks] == [b"data: 2\n\n"]
        await server
        assert node.how == "finished"
        with pytest.raises(NodeLost, match="Cannot connect"):
            await post(pool, url + "/echo")


async def test_who_refuses_what_is_new_by_itself_is_reached_until_the_last_request_has_ended(pool):
    node, told = Node(), asyncio.Event()
    async with running(node.app, on_stop=told.set) as ((url,), stop, server):
        assert await post(pool, url + "/echo") == (200, b"")
        node.turn.release()
        async with await pool.request("POST", url + "/stream") as reply:
            chunks = reply.chunks()
            await anext(chunks)
            stop.set()
            await told.wait()
            for _ in range(2):  # on a new connection, which is kept for the next time
                assert await post(pool, url + "/echo", b"?") == (200, b"?")
            assert "idle=1" in repr(pool)
            for _ in range(2):
                node.turn.release()
            assert b"".join([chunk async for chunk in chunks]) == b"data: 1\n\ndata: 2\n\n"
        async with asyncio.timeout(2.0):
            await server
        with pytest.raises(NodeLost, match="Cannot connect"):
            await post(pool, url + "/echo")


@pytest.mark.parametrize("on_stop", [None, lambda: None])
async def test_stopping_waits_only_so_long(pool, caplog, on_stop):
    node = Node()
    async with running(node.app, drain_s=0.05, on_stop=on_stop) as ((url,), stop, server):
        node.turn.release()
        async with await pool.request("POST", url + "/stream") as reply:
            chunks = reply.chunks()
            await anext(chunks)
            stop.set()
            async with asyncio.timeout(2.0):
                await server
            assert node.how == "cancelled"
            with pytest.raises(NodeLost):
                await anext(chunks)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize("on_stop", [None, lambda: None])
async def test_what_is_cut_when_the_time_is_over_tells_its_clients(pool, on_stop):
    node = Node()
    stopping = Busy("We are stopping.", code="stopping")
    options = {"drain_s": 0.05, "on_stop": on_stop, "cut": lambda: node.app.cut(stopping)}
    async with running(node.app, **options) as ((url,), stop, server):
        node.turn.release()
        async with await pool.request("POST", url + "/stream") as reply:
            chunks = reply.chunks()
            assert await anext(chunks) == b"data: 0\n\n"
            stop.set()
            assert [chunk async for chunk in chunks] == [b"data: stopping\n\n"]
        async with asyncio.timeout(2.0):
            await server
        assert node.how == "cancelled"


async def test_a_client_that_does_not_take_its_last_words_is_waited_for_a_moment_only(monkeypatch):
    monkeypatch.setattr("cortex.web.listener._LAST_WORDS_S", 0.05)
    begun, ended = asyncio.Event(), asyncio.Event()

    async def endless(request):
        async def source():
            try:
                while True:
                    begun.set()
                    yield b"x" * 65536
            finally:
                ended.set()

        return EventStream(source(), fail=lambda error: b"the end")

    app = Service([Route("GET", "/", endless)], name="test")
    async with running(app, drain_s=0.05, cut=lambda: app.cut(Busy("Stop."))) as ((url,), stop, server):
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as deaf:
            deaf.send(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            await begun.wait()
            stop.set()
            async with asyncio.timeout(2.0):
                await server
            assert ended.is_set()


async def test_a_port_in_use_is_said_so_and_takes_nothing():
    with socket.create_server(("127.0.0.1", 0)) as taken, socket.create_server(("127.0.0.1", 0)) as other:
        free = f"127.0.0.1:{other.getsockname()[1]}"
        other.close()
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(BindError, match=f"cannot listen on {bind}: Address already in use"):
            await serve([(free, Node().app), (bind, Node().app)], stop=asyncio.Event())
        socket.create_server(("127.0.0.1", int(free.rpartition(":")[2]))).close()


@pytest.mark.parametrize(
    "bind", ["", "8080", "127.0.0.1", ":8080", "127.0.0.1:", "127.0.0.1:x", "127.0.0.1:70000", "127.0.0.1:-1"]
)
async def test_an_address_of_the_wrong_form_is_said_so(bind):
    with pytest.raises(BindError, match="expected host:port"):
        await serve([(bind, Node().app)], stop=asyncio.Event())


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
async def test_an_address_that_is_not_ours_is_said_so(host):
    with pytest.raises(BindError, match=f"cannot listen on {host}:0: "):
        await serve([(f"{host}:0", Node().app)], stop=asyncio.Event())


async def test_what_is_no_http_is_refused_and_disturbs_nobody(pool):
    async with running(Node().app) as ((url,), _, _):
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 400")
        writer.close()
        await writer.wait_closed()
        assert await post(pool, url + "/echo", b"x") == (200, b"x")


def test_it_all_runs_on_uvloop():
    async def main():
        node, pool = Node(), Pool()
        async with running(node.app) as ((url,), _, _):
            assert await post(pool, url + "/echo", b"x" * 300_000) == (200, b"x" * 300_000)
            node.turn.release()
            async with await pool.request("POST", url + "/stream") as reply:
                assert await anext(reply.chunks()) == b"data: 0\n\n"
            await node.ended.wait()
            await pool.aclose()
        return node.how

    assert uvloop.run(main()) == "cancelled"
