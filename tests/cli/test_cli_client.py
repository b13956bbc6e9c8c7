"""What a command says when the endpoint is not there, not right, or not willing."""

import asyncio
import socket

import pytest

from cortex.cli.client import Address, clean_endpoint, run
from cortex.cli.failure import Failure, Interrupted
from cortex.wire.errors import NodeLost


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [
        ("http://beast:31313", "http://beast:31313"),
        ("http://beast:31313/", "http://beast:31313"),
        ("http://beast:31313/v1", "http://beast:31313"),  # an OPENAI_BASE_URL, pasted
        ("beast:31313", "http://beast:31313"),
        ("https://cortex.example", "https://cortex.example"),
        ("http://[::1]:31313", "http://[::1]:31313"),
    ],
)
def test_an_endpoint_may_be_written_as_people_do(text: str, endpoint: str) -> None:
    assert clean_endpoint(text) == endpoint


@pytest.mark.parametrize(
    "text", ["", "ftp://x", "http://", "http://x:port", "http://x:70000", "http://x/y", "http://["]
)
def test_what_is_no_endpoint_is_a_misuse_in_one_line(cortex, text: str) -> None:
    result = cortex("models", "--endpoint", text)
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {text!r} is no endpoint")
    assert result.stderr.count("\n") == 1


def test_an_endpoint_where_nobody_listens_is_named_with_what_to_do(cortex) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, not listening: nobody else can take it meanwhile
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        for command in (["status"], ["models"], ["load", "m"], ["unload", "m"], ["chat", "m", "-m", "hi"]):
            result = cortex(*command, "--endpoint", address)
            assert result.exit_code == 1
            assert result.stderr.startswith(f"error: nothing answers at {address} (")
            assert "`cortex up`" in result.stderr
            assert "--endpoint or CORTEX_ENDPOINT" in result.stderr
            assert result.stderr.count("\n") == 1


def test_a_connection_that_breaks_is_one_line(endpoint, cortex) -> None:
    endpoint.on("GET", "/v1/models", NodeLost("The connection broke."))
    assert cortex("models").stderr == "error: The connection broke.\n"


def test_interrupting_a_command_is_no_traceback() -> None:
    async def work(client: object) -> None:
        asyncio.get_running_loop().call_soon(interrupt)
        await asyncio.Event().wait()

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        run(Address(), work)
    assert caught.value.exit_code == 130


def test_a_failure_is_one_line_whatever_the_message() -> None:
    assert Failure("two\nlines  and\tmore").message == "two lines and more"
