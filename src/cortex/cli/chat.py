"""`cortex chat`: a conversation in the terminal, one message with -m, or a line of stdin after the other.

Keeps the history, streams answers, survives Ctrl-C. Knows chat completions, not how models run.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Final

import click

from cortex.cli.client import Address, Client, address_options, make_pool, refused
from cortex.cli.failure import Failure, Interrupted
from cortex.cli.view import list_models
from cortex.wire.chat import Peek, peek
from cortex.wire.errors import from_reply

PROMPT: Final = ">>> "
QUIT: Final = frozenset({"/quit", "/exit"})
CLEAR: Final = "/clear"
DIM: Final = "\x1b[2m"
PLAIN: Final = "\x1b[0m"
HINT: Final = "Ctrl-C stops an answer, /clear forgets the conversation, /quit or Ctrl-D leaves."

_CONTROLS: Final = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}
"""Dropped on a terminal: a model must not be able to move the cursor or rename the window."""


class Screen:
    """Writes an answer as it comes; reasoning dimmed on a terminal and left out elsewhere."""

    def __init__(self, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self._dim = False
        self._column_zero = True

    def reasoning(self, text: str) -> None:
        if self._is_terminal and text:
            self._write("" if self._dim else DIM, text)
            self._dim = True

    def content(self, text: str) -> None:
        if self._dim and text:
            self._write(PLAIN + ("" if self._column_zero else "\n"), "")
            self._dim = False
        self._write("", text)

    def end(self) -> None:
        """Closes the line of the answer."""
        self._write(PLAIN if self._dim else "", "" if self._column_zero else "\n")
        self._dim = False
        self._column_zero = True

    def _write(self, code: str, text: str) -> None:
        shown = text.translate(_CONTROLS) if self._is_terminal else text
        if shown:
            self._column_zero = shown.endswith("\n")
        sys.stdout.write(code + shown)
        sys.stdout.flush()


class Conversation:
    """The history and the settings of one chat. A turn that failed leaves no trace in the history."""

    def __init__(self, model: str, system: str | None, settings: dict[str, Any], screen: Screen) -> None:
        self.model = model
        self._opening = [{"role": "system", "content": system}] if system else []
        self._settings = {name: value for name, value in settings.items() if value is not None}
        self._screen = screen
        self.messages: list[dict[str, str]] = list(self._opening)

    def clear(self) -> None:
        self.messages = list(self._opening)

    async def turn(self, client: Client, text: str) -> None:
        """Asks and shows the answer as it comes. Cancelled midway, what was said so far is kept.

        Raises Failure.
        """
        sendable = text.encode("utf-8", "replace").decode()  # argv may hold what UTF-8 cannot
        asked = [*self.messages, {"role": "user", "content": sendable}]
        said: list[str] = []
        try:
            async with aclosing(self._answer(client, asked)) as pieces:
                async for piece in pieces:
                    said.append(piece)
        except Failure:
            said.clear()
            raise
        finally:
            self._screen.end()
            if said:
                self.messages = [*asked, {"role": "assistant", "content": "".join(said)}]

    async def _answer(self, client: Client, messages: list[dict[str, str]]) -> AsyncGenerator[str, None]:
        body = {"model": self.model, "messages": messages, "stream": True, **self._settings}
        finished = False
        async with aclosing(client.events("/v1/chat/completions", body)) as events:
            async for event in events:
                if event.data == b"[DONE]":
                    return
                chunk = peek(event.data)
                if chunk.error is not None:
                    raise refused(from_reply(500, event.data))
                finished = finished or any(choice.finish_reason for choice in chunk.choices)
                text = self._show(chunk)
                if text:
                    yield text
        if not finished:
            raise Failure("the connection ended in the middle of the answer.")

    def _show(self, chunk: Peek) -> str:
        text = ""
        for choice in chunk.choices:
            if choice.delta:
                self._screen.reasoning(choice.delta.reasoning_content or choice.delta.reasoning or "")
                self._screen.content(choice.delta.content or "")
                text += choice.delta.content or ""
        return text


async def choose_model(client: Client) -> str:
    """The only model there is, or the only one that is loaded. Raises Failure."""
    cards = [card for card in await list_models(client) if card.alias_of is None]
    loaded = [card.id for card in cards if card.loaded]
    if len(loaded) == 1:
        return loaded[0]
    if len(cards) == 1:
        return cards[0].id
    if not cards:
        raise Failure("there is no model to talk to; `cortex load MODEL` loads one.")
    names = ", ".join(loaded or [card.id for card in cards])
    raise Failure(f"say which model: cortex chat MODEL, one of {names}.")


@click.command()
@click.argument("model", required=False)
@click.option("-m", "--message", help="Ask this, print the answer and leave.")
@click.option("--system", help="The system message.")
@click.option("--temperature", type=click.FloatRange(0), help="0 always takes the likeliest token.")
@click.option("--max-tokens", type=click.IntRange(1), help="The longest answer.")
@address_options
def chat(
    model: str | None,
    message: str | None,
    system: str | None,
    temperature: float | None,
    max_tokens: int | None,
    endpoint: str,
    key: str | None,
) -> None:
    """Talk to MODEL; without it, to the one that is loaded."""
    interactive = message is None and sys.stdin.isatty()
    settings = {"temperature": temperature, "max_tokens": max_tokens}
    with asyncio.Runner() as runner:
        pool = runner.run(make_pool())
        client = Client(Address(endpoint, key), pool)
        try:
            name = model or runner.run(choose_model(client))
            conversation = Conversation(name, system, settings, Screen(sys.stdout.isatty()))
            if message is not None:
                runner.run(conversation.turn(client, message))
            elif interactive:
                click.echo(f"{name}. {HINT}", err=True)
                _talk(runner, client, conversation)
            else:
                _answer_lines(runner, client, conversation)
        except KeyboardInterrupt:
            raise Interrupted from None
        finally:
            runner.run(pool.aclose())


def _answer_lines(runner: asyncio.Runner, client: Client, conversation: Conversation) -> None:
    for line in sys.stdin.buffer:
        text = line.decode("utf-8", "replace").strip()
        if text in QUIT:
            return
        if text == CLEAR:
            conversation.clear()
        elif text:
            runner.run(conversation.turn(client, text))


def _talk(runner: asyncio.Runner, client: Client, conversation: Conversation) -> None:
    """Prompt and answer in turn. Ctrl-C ends the answer or empties the line; errors end the turn."""
    for text in _typed():
        if text == CLEAR:
            conversation.clear()
            continue
        try:
            runner.run(conversation.turn(client, text))
        except KeyboardInterrupt:
            click.echo("(stopped)", err=True)
        except Failure as failure:
            failure.show()


def _typed() -> Iterator[str]:
    import readline  # noqa: F401  - gives input() line editing and history

    while True:
        try:
            text = input(PROMPT).strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo()
            continue
        except UnicodeDecodeError:
            click.echo("error: that line was not UTF-8.", err=True)
            continue
        if text in QUIT:
            return
        if text:
            yield text
