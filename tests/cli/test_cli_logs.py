"""The log lines of the daemons."""

import io
import logging
import re
from collections.abc import Iterator

import pytest

from cortex.cli.logs import LineFormatter, log_to


@pytest.fixture
def root() -> Iterator[logging.Logger]:
    logger = logging.getLogger()
    handlers, level = logger.handlers, logger.level
    yield logger
    logger.handlers, logger.level = handlers, level
    logging.captureWarnings(False)


def test_a_record_is_one_line_with_time_level_and_logger(root: logging.Logger) -> None:
    out = io.StringIO()
    log_to(out)
    logging.getLogger("cortex.poller").info("node up node=%s", "beast")
    logging.getLogger("cortex.poller").debug("unseen")
    assert re.fullmatch(
        r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z level=info logger=cortex\.poller node up node=beast\n",
        out.getvalue(),
    )


def test_a_message_cannot_forge_a_record() -> None:
    record = logging.makeLogRecord({"msg": "a\ntime=2026 level=error\r", "levelname": "INFO", "name": "x"})
    assert LineFormatter().format(record).endswith(r"logger=x a\ntime=2026 level=error\r")


def test_what_leads_a_terminal_is_written_out() -> None:
    record = logging.makeLogRecord({"msg": "model=a\0b\x1b[2J\x9b\u2028 é\t€", "name": "x"})
    assert LineFormatter().format(record).endswith(r"logger=x model=a\x00b\x1b[2J\x9b\u2028 é\t€")


def test_a_traceback_follows_indented() -> None:
    try:
        raise ValueError("no")
    except ValueError as error:
        record = logging.makeLogRecord(
            {"msg": "failed", "exc_info": (ValueError, error, error.__traceback__)}
        )
    first, *rest = LineFormatter().format(record).splitlines()
    assert first.endswith("failed")
    assert rest[-1] == "    ValueError: no"
    assert all(line.startswith("    ") for line in rest)
