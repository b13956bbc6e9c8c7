"""Tables for people and JSON for scripts, both on stdout. Knows no command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import click
import msgspec

WIDE: Final = 400
"""Columns when nobody looks at a terminal: nothing may be cut or wrapped."""

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")


def write_json(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def write_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A column whose name ends in `>` is right-aligned; None shows as `-`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDE
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for column in columns:
        justify: Any = "right" if column.endswith(">") else "left"
        table.add_column(column.removesuffix(">"), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text("-" if cell is None or cell == "" else str(cell)) for cell in row))
    console.print(table)


def memory(megabytes: float) -> str:
    """MiB as people read them: `512 MiB`, `23.5 GiB`."""
    return f"{megabytes / 1024:.1f} GiB" if megabytes >= 1024 else f"{megabytes:.0f} MiB"
