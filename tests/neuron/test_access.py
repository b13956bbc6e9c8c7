from __future__ import annotations

import pytest

from cortex.neuron.access import node_guard
from cortex.testing import AsgiClient
from cortex.web.asgi import Request, Response
from cortex.web.service import Route, Service

LOOPBACK = ("127.0.0.1", 5000)
ELSEWHERE = ("10.0.0.7", 5000)


async def ok(request: Request) -> Response:
    return Response(b"{}")


def client(token: str | None, peer: tuple[str, int] | None) -> AsgiClient:
    paths = ("/health", "/discovery", "/version", "/metrics", "/models", "/v1/models")
    app = Service([Route("GET", path, ok) for path in paths], name="test", guard=node_guard(token))
    return AsgiClient(app, peer=peer)


@pytest.mark.parametrize("path", ["/health", "/discovery", "/version", "/metrics"])
@pytest.mark.parametrize("token", [None, "secret"])
async def test_how_the_node_is_may_be_read_by_anybody(path: str, token: str | None) -> None:
    assert (await client(token, ELSEWHERE).get(path)).status == 200


@pytest.mark.parametrize("peer", [LOOPBACK, ("::1", 5000), ("::ffff:127.0.0.1", 5000)])
async def test_without_a_token_this_machine_is_served(peer: tuple[str, int]) -> None:
    assert (await client(None, peer).get("/models")).status == 200


@pytest.mark.parametrize(
    ("peer", "headers"),
    [
        (ELSEWHERE, {}),
        (None, {}),
        (LOOPBACK, {"x-forwarded-for": "10.0.0.7"}),
        (LOOPBACK, {"forwarded": "for=10.0.0.7"}),
        (LOOPBACK, {"via": "1.1 proxy"}),
        (ELSEWHERE, {"x-forwarded-for": "127.0.0.1"}),
    ],
)
async def test_without_a_token_all_others_are_told_what_to_set(
    peer: tuple[str, int] | None, headers: dict[str, str]
) -> None:
    reply = await client(None, peer).get("/v1/models", headers=headers)
    assert reply.status == 401
    assert "set node_token" in reply.json()["error"]["message"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer secret"}, 200),
        ({"authorization": "Bearer secret2"}, 401),
        ({"authorization": "Bearer sécret"}, 401),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "secret"}, 401),
        ({}, 401),
    ],
)
@pytest.mark.parametrize("peer", [LOOPBACK, ELSEWHERE])
async def test_with_a_token_everybody_needs_it(
    headers: dict[str, str], status: int, peer: tuple[str, int]
) -> None:
    assert (await client("secret", peer).get("/models", headers=headers)).status == status


async def test_a_path_that_does_not_exist_tells_strangers_nothing() -> None:
    assert (await client("secret", ELSEWHERE).get("/nothing/here")).status == 401
