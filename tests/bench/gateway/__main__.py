"""The command line: which gateways, how long, where to. Exit code 0: every comparable target is met."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

from . import report
from .gateways import ALL, OURS, NotAvailable
from .measure import compare

_QUIET_LOAD: Final = 0.5
_MISSED, _BROKEN, _STOPPED = 1, 2, 130


def main() -> int:
    options = _options()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    started, busy = time.monotonic(), os.getloadavg()[0]
    chosen = [gateway for gateway in ALL if gateway.name in options.only]
    rounds, scale = (2, 0.5) if options.quick else (5, 1.0)
    try:
        subjects = compare(chosen, rounds, scale)
    except NotAvailable as error:
        print(f"The benchmark's own upstream {error}", file=sys.stderr)
        return _BROKEN
    except KeyboardInterrupt:
        print("stopped; every child has ended", file=sys.stderr)
        return _STOPPED
    verdicts = report.targets(subjects)
    print(report.table(subjects))
    print(f"\nMedians of {rounds} rounds; {time.monotonic() - started:.0f} s in all. Targets:")
    if busy > _QUIET_LOAD:
        print(f"(The load average was {busy:.1f} at the start: other work inflates CPU times.)")
    print("\n".join(map(str, verdicts)))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(subjects, verdicts), indent=1) + "\n")
    if OURS.name in subjects and subjects[OURS.name].missing:
        return _BROKEN
    return _MISSED if any(verdict.met is False for verdict in verdicts) else 0


def _options() -> argparse.Namespace:
    names = [gateway.name for gateway in ALL]

    def chosen(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return found

    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    parser.add_argument("--quick", action="store_true", help="a rough look, about a minute")
    parser.add_argument("--only", type=chosen, default=names, metavar="NAMES", help="gateways, with commas")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
