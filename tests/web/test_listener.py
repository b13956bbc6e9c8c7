"""Connections from accept to end: none outlives its client, or is waited for too long."""

import asyncio
import contextlib
import logging
import socket

import pytest
from hypercorn.config import Config
from hypercorn.events import RawData

from cortex.web.asgi import EventStream, Response
from cortex.web.listener import ServedConnection, Serving, listen
from cortex.web.service import Route, Service


class App:
    """Echoes on /, streams without end on /endless."""

    def __init__(self):
        self.ended = asyncio.Event()
        routes = [Route("POST", "/", self.echo), Route("GET", "/endless", self.endless)]
        self.service = Service(routes, name="test")

    async def echo(self, request):
        return Response(await request.body())

    async def endless(self, request):
        async def source():
            try:
                while True:
                    yield b"x" * 65536
            finally:
                self.ended.set()

        return EventStream(source(), fail=lambda error: b"")


@contextlib.asynccontextmanager
async def listening(app, sock=None):
    sock = sock or socket.create_server(("127.0.0.1", 0))
    stop = asyncio.Event()
    task = asyncio.create_task(listen(sock, app.service, stop, 5.0))
    try:
        yield sock.getsockname()
    finally:
        stop.set()
        async with asyncio.timeout(2.0):
            await task


async def connections_ended(before):
    async with asyncio.timeout(5.0):
        while asyncio.all_tasks() - before:
            await asyncio.sleep(0)


POST = b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"


@pytest.mark.parametrize("sent", [b"", b"POST / HT", POST + b"he", POST + b"hello"])
async def test_a_connection_ends_when_its_client_has_closed_it(sent):
    async with listening(App()) as address:
        await asyncio.sleep(0)
        before = asyncio.all_tasks()
        reader, writer = await asyncio.open_connection(*address)
        writer.write(sent)
        if sent.endswith(b"hello"):
            await reader.readuntil(b"hello")
        writer.close()
        await writer.wait_closed()
        await connections_ended(before)


async def test_a_kept_connection_serves_the_next_request():
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        for _ in range(3):
            writer.write(POST + b"hello")
            assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()


async def test_two_requests_in_one_write_are_answered_in_turn():
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(POST + b"hello" + POST + b"world")
        await reader.readuntil(b"hello")
        await reader.readuntil(b"world")
        writer.close()
        await writer.wait_closed()


async def test_a_connection_ends_too_when_its_app_answers_a_client_that_has_left():
    left = asyncio.Event()

    async def late(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})
        left.set()

    app = App()
    app.service = late
    async with listening(app) as address:
        await asyncio.sleep(0)
        before = asyncio.all_tasks()
        _, writer = await asyncio.open_connection(*address)
        writer.write(POST + b"hello")
        writer.close()
        await writer.wait_closed()
        await left.wait()
        await connections_ended(before)


async def test_a_head_waits_for_the_bytes_after_it_so_that_they_leave_together():
    written = []

    class Writer:
        def write(self, data):
            written.append(data)

        async def drain(self):
            pass

    connection = ServedConnection(None, Config(), Serving(), None, Writer())
    for data in (
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"hello",
        b"HTTP/1.1 204 \r\n\r\n",
        b"",
    ):
        await connection.protocol_send(RawData(data))
    assert written == [
        b"HTTP/1.1 100 Continue\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n\r\nhello",
        b"HTTP/1.1 204 \r\n\r\n",
    ]


async def test_long_headers_are_read():
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        for part in (POST[:-2] + b"authorization: Bearer ", b"k" * 20_000, b"k" * 20_000, b"\r\n\r\nhello"):
            writer.write(part)
            for _ in range(10):
                await asyncio.sleep(0)
        assert (await reader.readuntil(b"hello")).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()


async def test_a_body_that_looks_like_a_head_comes_whole():
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        body = b"HTTP/1.1 200 OK\r\n\r\n"
        writer.write(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))
        await reader.readuntil(b"\r\n\r\n")
        assert await reader.readexactly(len(body)) == body
        writer.close()
        await writer.wait_closed()


async def test_a_client_that_waits_to_be_told_to_go_on_is_told():
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(POST.replace(b"\r\n\r\n", b"\r\nexpect: 100-continue\r\n\r\n"))
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(b"hello")
        await reader.readuntil(b"hello")
        writer.close()
        await writer.wait_closed()


async def test_the_reply_to_head_is_complete():
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(b"HEAD /endless HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert (await reader.read()).startswith(b"HTTP/1.1 200")
        writer.close()
        await writer.wait_closed()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="needs Linux")
async def test_a_connection_that_the_kernel_gives_up_is_no_news(caplog):
    app = App()
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 200)
    async with listening(app, sock) as address:
        await asyncio.sleep(0)
        before = asyncio.all_tasks()
        with socket.create_connection(address) as deaf:
            deaf.send(b"GET /endless HTTP/1.1\r\nhost: x\r\n\r\n")
            await app.ended.wait()
            await connections_ended(before)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_stopping_does_not_wait_for_idle_connections():
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(POST + b"hello")
        await reader.readuntil(b"hello")
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()


async def test_an_idle_connection_is_ended_by_its_timer(monkeypatch):
    monkeypatch.setattr("cortex.web.listener.KEEP_ALIVE_S", 0.05)
    async with listening(App()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(POST + b"hello")
        await reader.readuntil(b"hello")
        async with asyncio.timeout(2.0):
            assert await reader.read() == b""
        writer.close()


async def test_a_connection_that_becomes_idle_while_the_server_stops_is_ended():
    sock = socket.create_server(("127.0.0.1", 0))
    stop = asyncio.Event()
    released = asyncio.Event()
    arrived = asyncio.Event()

    async def wait(request):
        arrived.set()
        await released.wait()
        return Response(b"done")

    service = Service([Route("GET", "/", wait)], name="test")
    task = asyncio.create_task(listen(sock, service, stop, 5.0))
    reader, writer = await asyncio.open_connection(*sock.getsockname())
    writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
    await arrived.wait()
    stop.set()
    released.set()
    async with asyncio.timeout(2.0):
        assert (await reader.read()).endswith(b"done")
        await task
    writer.close()
