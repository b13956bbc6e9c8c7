"""How a command ends badly: one line on stderr and an exit code. Knows no command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO, Any

import click


class Failure(click.ClickException):
    """Ends the command with `error: message` and status 1; `more` are further lines, as they are."""

    def __init__(self, message: str, more: Sequence[str] = ()) -> None:
        super().__init__(" ".join(message.split()))
        self.more = list(more)

    def show(self, file: IO[Any] | None = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=file is None)
        for line in self.more:
            click.echo(f"  {line}", file=file, err=file is None)


class Misuse(Failure):
    """What was asked for cannot be meant: a bad option or configuration. Status 2."""

    exit_code = 2


class Interrupted(Failure):
    """Ctrl-C where it ends the program. Status 130, as shells have it."""

    exit_code = 130

    def __init__(self) -> None:
        super().__init__("stopped.")
