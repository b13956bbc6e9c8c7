"""Logs of the daemons on stderr: a line a record, `time= level= logger=` and then what the record says.

The records themselves are words and `key=value` pairs. Knows no logger by name.
"""

from __future__ import annotations

import logging
import re
import sys
from datetime import UTC, datetime
from typing import IO, Final

_CONTROL: Final = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")


class LineFormatter(logging.Formatter):
    """One line a record, UTC; only a traceback adds lines, indented so that none looks like a record."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        message = _printable(record.getMessage())
        level = record.levelname.lower()
        line = f"time={time.removesuffix('+00:00')}Z level={level} logger={record.name} {message}"
        if record.exc_info:
            rows = self.formatException(record.exc_info).splitlines()
            line += "".join(f"\n    {_printable(row)}" for row in rows)
        return line


def _printable(text: str) -> str:
    """Characters that lead a terminal, or what reads the log, and say nothing, as Python writes them."""
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)


def log_to(stream: IO[str] | None = None, level: int = logging.INFO) -> None:
    """Sends every logger's records to `stream` (default: stderr) and nowhere else."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(LineFormatter())
    # Nobody prints these, and each costs every record something.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    logging.captureWarnings(True)
