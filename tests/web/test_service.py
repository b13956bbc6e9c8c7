"""The border of a service: replies, refusals, HEAD, CORS, the body cap and the request id."""

import asyncio
import json
import logging

import pytest

from cortex.testing import AsgiClient
from cortex.web.asgi import EventStream, Response, json_response
from cortex.web.service import Route, Service
from cortex.wire.errors import Busy, Unauthorized, to_bytes


async def hello(request):
    return json_response({"path": request.path, "body": (await request.body()).decode()})


async def test_a_reply_has_length_type_and_request_id(serving):
    reply = await serving(hello).post("/", body=b"hi")
    assert (reply.status, reply.json()) == (200, {"path": "/", "body": "hi"})
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["content-length"] == str(len(reply.body))
    assert len(reply.headers["x-request-id"]) == 32


@pytest.mark.parametrize("sent", ["abc-1", "x" * 128])
async def test_a_sane_request_id_is_kept(serving, sent):
    reply = await serving(hello).get("/", headers={"x-request-id": sent})
    assert reply.headers["x-request-id"] == sent


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "a\tb", "é", "a\r\nset-cookie: b"])
async def test_any_other_request_id_is_replaced(serving, sent):
    reply = await serving(hello).get("/", headers={"x-request-id": sent})
    assert reply.headers["x-request-id"] != sent
    assert reply.headers["x-request-id"].isalnum()


async def test_the_handler_sees_headers_query_peer_and_the_same_body_twice(serving):
    seen = []

    async def handler(request):
        seen.append((request.headers["x-a"], request.query, request.client, request.method, request.started))
        assert await request.body() == await request.body() == b"body"
        return Response()

    client = serving(handler)
    await client.request("POST", "/?a=1&a=2&b=&c=%20", body=b"body", headers={"X-A": "1"})
    assert seen == [("1", {"a": "1", "b": "", "c": " "}, ("127.0.0.1", 40000), "POST", 1000.0)]


async def test_of_a_repeated_header_the_first_value_counts(serving):
    seen = []

    async def handler(request):
        seen.append(request.headers["x-a"])
        return Response()

    client = serving(handler)
    app = client.app

    async def repeated(scope, receive, send):
        await app({**scope, "headers": [(b"x-a", b"1"), (b"x-a", b"2")]}, receive, send)

    await AsgiClient(repeated).get("/")
    assert seen == ["1"]


async def test_head_is_get_without_the_body(serving):
    client = serving(hello)
    whole = await client.get("/")
    reply = await client.request("HEAD", "/")
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["content-length"] == whole.headers["content-length"]


async def test_head_of_a_stream_starts_it_and_closes_it(serving):
    closed = []

    async def handler(request):
        async def source():
            try:
                yield b"data: 1\n\n"
                await asyncio.Event().wait()
            finally:
                closed.append(True)

        return EventStream(source(), fail=to_bytes)

    reply = await serving(handler).request("HEAD", "/")
    assert (reply.status, reply.body, closed) == (200, b"", [True])
    assert reply.headers["content-type"] == "text/event-stream"


async def test_preflight_is_answered_outside_the_guard(serving):
    def guard(request, route):
        raise Unauthorized("no key")

    client = serving(hello, guard=guard)
    headers = {"origin": "http://app", "access-control-request-headers": "authorization, x-b"}
    reply = await client.request("OPTIONS", "/", headers=headers)
    assert reply.status == 204
    assert reply.headers["access-control-allow-origin"] == "*"
    assert reply.headers["access-control-allow-headers"] == "authorization, x-b"
    assert reply.headers["access-control-allow-methods"] == "GET, HEAD, OPTIONS, POST"
    assert "content-length" not in reply.headers
    refused = await client.get("/", headers={"origin": "http://app"})
    assert (refused.status, refused.headers["access-control-allow-origin"]) == (401, "*")


async def test_options_of_nothing_is_404(serving):
    assert (await serving(hello).request("OPTIONS", "/nothing")).status == 404


async def test_unknown_paths_and_methods_are_refused_by_name(serving):
    client = serving(hello)
    unknown = await client.get("/nothing")
    assert (unknown.status, unknown.json()["error"]["code"]) == (404, "unknown_route")
    assert "/nothing" in unknown.json()["error"]["message"]
    wrong = await client.request("DELETE", "/")
    assert (wrong.status, wrong.headers["allow"]) == (405, "GET, HEAD, OPTIONS, POST")
    assert wrong.json()["error"]["code"] == "method_not_allowed"


async def test_every_refusal_has_the_shape_of_its_route():
    def shape(name):
        return lambda error: (error.status, [("content-type", f"text/{name}")], error.code.encode())

    async def failing(request):
        raise Busy("full", retry_after=3)

    def guard(request, route):
        if "x-bad" in request.headers:
            raise Unauthorized("no key")

    route = Route("POST", "/a", failing, shape("route"))
    client = AsgiClient(Service([route], name="test", guard=guard, render_error=shape("service")))
    for reply, status, kind, body in [
        (await client.post("/a"), 503, "text/route", b"busy"),
        (await client.get("/a"), 405, "text/route", b"method_not_allowed"),
        (await client.post("/a", headers={"x-bad": "1"}), 401, "text/route", b"invalid_api_key"),
        (await client.get("/b"), 404, "text/service", b"unknown_route"),
        (await client.get("/b", headers={"x-bad": "1"}), 401, "text/service", b"invalid_api_key"),
    ]:
        assert (reply.status, reply.headers["content-type"], reply.body) == (status, kind, body)


async def test_an_error_carries_its_retry_after(serving):
    async def handler(request):
        raise Busy("full", retry_after=2.5)

    reply = await serving(handler).post("/")
    assert (reply.status, reply.headers["retry-after"]) == (503, "3")


async def test_a_crash_is_500_and_its_traceback_goes_to_the_log_only(serving, caplog):
    async def handler(request):
        raise RuntimeError("secret detail")

    reply = await serving(handler).post("/", headers={"x-request-id": "r1"})
    assert reply.status == 500
    assert b"secret" not in reply.body
    assert "r1" in reply.json()["error"]["message"]
    assert "secret detail" in caplog.text


async def test_the_guard_stands_before_the_body_and_the_handler(serving):
    called = []

    async def handler(request):
        called.append(request)
        return Response()

    def guard(request, route):
        raise Unauthorized("no key")

    async with serving(handler, guard=guard).open("POST", "/", body=None) as exchange:
        assert (await exchange.head())[0] == 401
    assert called == []


async def test_a_declared_body_over_the_cap_is_refused_before_it_is_read(serving):
    async with serving(hello, body_cap=10).open(
        "POST", "/", body=None, headers={"content-length": "11"}
    ) as exchange:
        status, _ = await exchange.head()
        assert status == 413
        body = await exchange.chunk()
        assert body is not None
        assert json.loads(body)["error"]["code"] == "request_too_large"


async def test_a_body_that_grows_over_the_cap_is_refused(serving):
    async with serving(hello, body_cap=10).open("POST", "/", body=None) as exchange:
        exchange.send_body(b"x" * 10, more=True)
        exchange.send_body(b"x", more=True)
        assert (await exchange.head())[0] == 413
    reply = await serving(hello, body_cap=10).post("/", body=b"x" * 10)
    assert reply.status == 200


async def test_the_rest_of_a_refused_body_is_read_so_that_the_client_sees_why(serving):
    async with serving(hello, body_cap=10).open("POST", "/", body=None) as exchange:
        exchange.send_body(b"x" * 11, more=True)
        assert (await exchange.head())[0] == 413
        assert b"larger than 10 bytes" in (await exchange.chunk() or b"")
        exchange.send_body(b"x" * 5, more=True)
        exchange.send_body(b"", more=False)
        assert await exchange.chunk() is None
        await exchange.ended()
        assert not exchange.disconnected


async def test_a_refused_body_is_not_read_without_end(serving):
    async with serving(hello, body_cap=10).open("POST", "/", body=None) as exchange:
        for _ in range(6):
            exchange.send_body(b"x" * 11, more=True)
        reply = await exchange.reply()
        assert reply.status == 413
        await exchange.ended()


async def test_a_server_that_waits_for_its_app_to_read_on_is_not_waited_for(serving):
    """Its queue of what was read is full; the last send wants to add the disconnect."""
    queue = asyncio.Queue(maxsize=2)
    app = serving(hello, body_cap=10).app
    sent = []

    async def client():
        while True:
            await queue.put({"type": "http.request", "body": b"x" * 11, "more_body": True})

    async def send(message):
        await asyncio.sleep(0)
        if message["type"] == "http.response.body" and not message["more_body"]:
            sending.cancel()
            await queue.put({"type": "http.disconnect"})
        sent.append(message["type"])

    sending = asyncio.create_task(client())
    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    await app(scope, queue.get, send)
    assert sent == ["http.response.start", "http.response.body", "http.response.body"]


async def test_one_log_line_tells_the_whole_request(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")

    async def handler(request):
        request.log.update(model="m", node="n 1", tokens=3, rate=1.5)
        return Response(b"12345")

    await serving(handler).request("POST", "/?secret=1", headers={"x-request-id": "r1"})
    (record,) = [record for record in caplog.records if record.name == "cortex.access.test"]
    assert record.getMessage() == (
        "method=POST path=/ status=200 bytes=5 duration=0.0000 id=r1 outcome=ok "
        'model=m node="n 1" tokens=3 rate=1.5000'
    )


async def test_no_path_can_forge_a_log_line(serving, caplog):
    caplog.set_level(logging.INFO, "cortex.access")
    await serving(hello).get("/%0Amethod=GET%20path=/admin%20status=200")
    await serving(hello).get("/" + "x" * 5000)
    forged, long = [record.getMessage() for record in caplog.records]
    assert "\n" not in forged
    assert forged.startswith(r'method=GET path="/\nmethod=GET path=/admin status=200" status=404')
    assert len(long) < 400


@pytest.mark.parametrize(
    ("error", "outcome"), [(Unauthorized("x"), "refused"), (Busy("x"), "failed"), (ValueError("x"), "failed")]
)
async def test_the_log_line_tells_refusals_from_failures(serving, caplog, error, outcome):
    caplog.set_level(logging.INFO, "cortex.access")

    async def handler(request):
        raise error

    await serving(handler).post("/")
    assert (
        f"outcome={outcome}" in next(r for r in caplog.records if r.name.startswith("cortex.access")).message
    )


async def test_lifespan_is_agreed_to(serving):
    app = serving(hello).app
    sent = []
    inbox = [{"type": "lifespan.shutdown"}, {"type": "lifespan.startup"}]

    async def receive():
        return inbox.pop()

    async def send(message):
        sent.append(message["type"])

    await app({"type": "lifespan"}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


async def test_a_websocket_is_refused(serving):
    sent = []

    async def receive():
        return {"type": "websocket.connect"}

    async def send(message):
        sent.append(message["type"])

    await serving(hello).app({"type": "websocket"}, receive, send)
    assert sent == ["websocket.close"]


@pytest.mark.parametrize(("path", "level"), [("/fine", "DEBUG"), ("/wrong", "INFO")])
async def test_a_poll_that_goes_well_is_logged_at_debug(caplog, path, level):
    async def fine(request):
        return Response(b"{}")

    async def wrong(request):
        raise Busy("not now")

    routes = [Route("GET", "/fine", fine, routine=True), Route("GET", "/wrong", wrong, routine=True)]
    with caplog.at_level(logging.DEBUG, "cortex.access"):
        await AsgiClient(Service(routes, name="polled")).get(path)
    assert [record.levelname for record in caplog.records if record.name == "cortex.access.polled"] == [level]
