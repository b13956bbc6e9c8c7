"""The route table: slashes in parameters, encoded or not, and the order of routes."""

import pytest

from cortex.testing import AsgiClient
from cortex.web.asgi import json_response
from cortex.web.service import Route, Service


def client(*routes: tuple[str, str], **options):
    def named(pattern):
        async def handler(request):
            return json_response({"route": pattern, "params": request.params})

        return handler

    return AsgiClient(
        Service([Route(method, path, named(path)) for method, path in routes], name="test", **options)
    )


@pytest.mark.parametrize(
    ("path", "id"),
    [
        ("/models/a", "a"),
        ("/models/org/name", "org/name"),
        ("/models/org%2Fname", "org/name"),
        ("/models/org%2fname", "org/name"),
        ("/models/a%20b", "a b"),
        ("/models/%C3%A9", "é"),
        ("/models/a%2520b", "a%20b"),
        ("/models//a", "/a"),
        ("/models/a/", "a/"),
        ("/models/a%3Fb", "a?b"),
    ],
)
async def test_a_path_parameter_may_hold_slashes(path, id):
    reply = await client(("GET", "/models/{id:path}")).get(path)
    assert reply.json()["params"] == {"id": id}


@pytest.mark.parametrize("path", ["/models/org/name/endpoint", "/models/org%2Fname/endpoint"])
async def test_a_path_parameter_may_have_something_after_it(path):
    routes = client(("GET", "/models/{id:path}/endpoint"), ("GET", "/models/{id:path}"))
    assert (await routes.get(path)).json() == {
        "route": "/models/{id:path}/endpoint",
        "params": {"id": "org/name"},
    }


async def test_a_plain_parameter_is_one_segment_but_takes_an_encoded_slash():
    routes = client(("GET", "/a/{x}/b"))
    assert (await routes.get("/a/1%2F2/b")).json()["params"] == {"x": "1/2"}
    assert (await routes.get("/a/1/2/b")).status == 404
    assert (await routes.get("/a//b")).status == 404


async def test_an_encoded_slash_is_no_separator():
    routes = client(("GET", "/a/b"), ("GET", "/a/{x}"))
    assert (await routes.get("/a/b")).json()["route"] == "/a/b"
    assert (await routes.get("/a/%2Fc")).json()["params"] == {"x": "/c"}


@pytest.mark.parametrize(
    "path", ["/models/", "/models", "/models/%00", "/models/a%00b", "/%6Dodels/x/y/..%00"]
)
async def test_nothing_is_no_parameter_and_nul_is_nothing(path):
    assert (await client(("GET", "/models/{id:path}")).get(path)).status == 404


async def test_literal_parts_are_compared_decoded():
    assert (await client(("GET", "/models/{id}")).get("/%6Dodels/x")).json()["params"] == {"id": "x"}


async def test_without_a_raw_path_the_decoded_one_serves():
    routes = client(("GET", "/models/{id:path}"))

    async def plain(scope, receive, send):
        await routes.app({name: value for name, value in scope.items() if name != "raw_path"}, receive, send)

    assert (await AsgiClient(plain).get("/models/a%2Fb")).json()["params"] == {"id": "a/b"}


async def test_routes_that_share_a_path_are_told_apart_by_headers():
    def named(name):
        async def handler(request):
            return json_response(name)

        return handler

    service = Service(
        [
            Route("POST", "/m", named("versioned"), matches=lambda headers: "x-version" in headers),
            Route("POST", "/m", named("plain"), matches=lambda headers: "x-plain" in headers),
        ],
        name="test",
    )
    asgi = AsgiClient(service)
    assert (await asgi.post("/m", headers={"x-version": "1"})).json() == "versioned"
    assert (await asgi.post("/m", headers={"x-plain": "1"})).json() == "plain"
    assert (await asgi.post("/m", headers={"x-plain": "1", "x-version": "1"})).json() == "versioned"
    assert (await asgi.post("/m")).status == 404


def test_a_parameter_that_is_part_of_a_segment_is_a_mistake():
    with pytest.raises(ValueError, match="whole segment"):
        client(("GET", "/a/x{id}"))
