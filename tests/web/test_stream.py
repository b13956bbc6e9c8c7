"""TCP streams: nothing is lost, a slow reader slows the peer, and an end is seen before it is announced."""

import asyncio
import contextlib
import socket
import ssl

import pytest

from cortex.web.client import ConnectFailed
from cortex.web.pool import Pool
from cortex.web.stream import READ_AHEAD, TcpStream, open_tcp

# Made for these tests: a key for nothing but "localhost" that nobody trusts.
CERTIFICATE = """\
-----BEGIN EC PRIVATE KEY-----
MHcCAQEEIGJOlshlXcpqzQVAnu9OkE6I9b5MVEanLj1DYumhYiyaoAoGCCqGSM49
AwEHoUQDQgAERHOG9hK1zds5bBwYlBASkgEHsadtaI08sFMZLF5LhEOTXccewZKz
uuy2oSuiIEuHLhwNQwnEkt/3sjw0O57Rug==
-----END EC PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUEajXieEcmW8oarcmfXpOntGVnIkwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyMzE4NDIxNloYDzIxMjYxMDMw
MTg0MjE2WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAREc4b2ErXN2zlsHBiUEBKSAQexp21ojTywUxksXkuEQ5Ndxx7BkrO6
7LahK6IgS4cuHA1DCcSS3/eyPDQ7ntG6o28wbTAdBgNVHQ4EFgQUsJn+1NmAV2Hi
IA/wMgEO2j+X4twwHwYDVR0jBBgwFoAUsJn+1NmAV2HiIA/wMgEO2j+X4twwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARgglsb2NhbGhvc3SHBH8AAAEwCgYIKoZI
zj0EAwIDSAAwRQIgIzdcliRCfQSI9yGjj0CssKvkv1hqE77imNzS8hbFzPkCIQDo
9cbqudU3KhXy7JgcMQTsb1nbBwlhlxFSg5SnJD86eg==
-----END CERTIFICATE-----
"""


class FakeTransport(asyncio.Transport):
    def __init__(self):
        self.near, self.far = socket.socketpair()
        super().__init__({"socket": self.near})
        self.reading = True
        self.written = b""
        self.closing = False

    def pause_reading(self):
        self.reading = False

    def resume_reading(self):
        self.reading = True

    def is_closing(self):
        return self.closing

    def write(self, data):
        self.written += data

    def abort(self):
        self.closing = True

    def get_write_buffer_size(self):
        return len(self.written)


@pytest.fixture
def transport():
    transport = FakeTransport()
    yield transport
    transport.near.close()
    transport.far.close()


@pytest.fixture
def stream(transport):
    stream = TcpStream()
    stream.connection_made(transport)
    return stream


async def test_all_that_came_is_one_read(stream):
    stream.data_received(b"a")
    stream.data_received(b"b")
    assert await stream.read() == b"ab"
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    stream.data_received(b"c")
    stream.data_received(b"d")
    assert await reading == b"cd"


async def test_what_came_before_the_end_is_read_before_it(stream):
    stream.data_received(b"a")
    stream.eof_received()
    stream.connection_lost(None)
    assert [await stream.read(), await stream.read(), await stream.read()] == [b"a", b"", b""]


async def test_a_broken_connection_is_an_os_error_whatever_broke_it(stream):
    stream.data_received(b"a")
    stream.connection_lost(RuntimeError("the loop's own"))
    assert await stream.read() == b"a"
    with pytest.raises(OSError, match="the loop's own"):
        await stream.read()


async def test_a_cancelled_read_loses_nothing(stream):
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    reading.cancel()
    stream.data_received(b"a")
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert await stream.read() == b"a"


async def test_a_slow_reader_slows_the_peer(stream, transport):
    stream.data_received(b"x" * READ_AHEAD)
    assert transport.reading
    stream.data_received(b"x")
    assert not transport.reading
    await stream.read()
    assert transport.reading


async def test_closing_ends_a_read_that_waits(stream, transport):
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    stream.close()
    assert await reading == b""
    assert transport.closing


async def test_nothing_is_handed_to_a_closed_connection(stream, transport):
    stream.write(b"a", b"b")
    assert (transport.written, stream.unsent()) == (b"ab", 2)
    stream.eof_received()
    with pytest.raises(OSError, match="closed"):
        stream.write(b"c")
    assert transport.written == b"ab"


@pytest.mark.parametrize("event", ["close", "send"])
async def test_an_end_is_seen_in_the_socket_before_the_loop_has_looked(stream, transport, event):
    assert stream.quiet()
    if event == "close":
        transport.far.close()
    else:
        transport.far.send(b"unasked")
    assert not stream.quiet()


async def test_a_stream_with_something_unread_is_not_quiet(stream):
    stream.data_received(b"a")
    assert not stream.quiet()
    await stream.read()
    assert stream.quiet()
    stream.eof_received()
    assert not stream.quiet()


@contextlib.asynccontextmanager
async def answering(*answers, context=None, host="127.0.0.1"):
    """A server that gives the next answer to each request, and closes after one that does not `keep`."""
    left = list(answers)
    connections = []

    async def serve(reader, writer):
        connections.append(writer)
        with contextlib.suppress(OSError):
            while left and await reader.readuntil(b"\r\n\r\n"):
                answer, keep = left.pop(0)
                writer.write(answer)
                await writer.drain()
                if not keep:
                    break
        writer.close()

    server = await asyncio.start_server(serve, host, 0, ssl=context)
    server.connections = connections
    async with server:
        yield server, server.sockets[0].getsockname()[1]
    for writer in connections:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


async def ask(pool, url):
    async with await pool.request("GET", url) as reply:
        return await reply.read()


async def test_a_server_that_closes_kept_connections_without_a_word_costs_no_request():
    async with answering((OK, False), (OK, False), (OK, False)) as (server, port):
        pool = Pool()
        for number in range(3):
            assert await ask(pool, f"http://127.0.0.1:{port}/") == b"ok"
            await server.connections[number].wait_closed()
        assert len(server.connections) == 3
        await pool.aclose()


async def test_a_port_nobody_listens_on_is_a_failed_connect():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pool = Pool()
    with pytest.raises(ConnectFailed, match=f"Cannot connect to http://127.0.0.1:{port}: "):
        await ask(pool, f"http://127.0.0.1:{port}/")
    assert repr(pool) == "Pool()"


@pytest.fixture
def certificate(tmp_path):
    path = tmp_path / "localhost.pem"
    path.write_text(CERTIFICATE)
    return path


async def test_https_is_tls_and_checks_the_certificate(certificate):
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(certificate)
    async with answering((OK, True), (OK, True), context=server_context) as (server, port):
        pool = Pool(tls=ssl.create_default_context(cafile=certificate))
        for _ in range(2):
            assert await ask(pool, f"https://localhost:{port}/") == b"ok"
        assert len(server.connections) == 1
        await pool.aclose()
        strict = Pool()
        with pytest.raises(ConnectFailed, match="certificate"):
            await ask(strict, f"https://localhost:{port}/")
        assert repr(strict) == "Pool()"


async def test_an_open_stream_can_be_closed_from_this_side():
    async with answering((OK, True)) as (_, port):
        stream = await open_tcp("127.0.0.1", port, None)
        stream.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await stream.read() == OK
        stream.close()
        assert not stream.quiet()
