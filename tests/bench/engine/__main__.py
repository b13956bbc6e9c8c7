"""The command line: which models, engines and parts, how often.

Exit code 0: every comparable target is met; 1: one is missed; 2: something of ours broke.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from cortex.wire.errors import CortexError

from . import models, report
from .child import ADAPTERS
from .measure import PATIENCE, QUICK, Extent, Found, compare
from .subjects import PROMPT_LOOKUP, environment

PARTS: Final = ("speed", "quality", "agents", "interference")
_QUIET_LOAD: Final = 0.5
_TEXTS, _QUICK_TEXTS = 4, 1
_MISSED, _BROKEN, _STOPPED = 1, 2, 130


def main() -> int:
    options = _options()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    started, busy = time.monotonic(), os.getloadavg()[0]
    extent = QUICK if options.quick else Extent()
    if options.no_prompt_lookup:
        os.environ[PROMPT_LOOKUP] = "off"
    if options.rounds:
        extent = replace(extent, rounds=options.rounds)
    try:
        results, quality = asyncio.run(_measure(options, extent))
    except CortexError as error:
        print(f"A model cannot be had: {error.message}", file=sys.stderr)
        return _BROKEN
    except KeyboardInterrupt:
        print("stopped; every child has ended", file=sys.stderr)
        return _STOPPED
    verdicts = report.targets(results, quality, options.parts)
    for text in (
        report.ratio_tables(results),
        report.quality_table(quality),
        report.manners_table(results),
        report.missing(results),
    ):
        if text:
            print(text + "\n")
    print(f"Medians of {extent.rounds} rounds; {time.monotonic() - started:.0f} s in all. Targets:")
    if options.no_prompt_lookup:
        print("(Ours computed no drafts.)")
    if options.quick:
        print("(A rough look: short conversations, a short long prompt, few positions.)")
    if busy > _QUIET_LOAD:
        print(f"(The load average was {busy:.1f} at the start: other work on these cores bends all figures.)")
    print("\n".join(map(str, verdicts)))
    if options.json:
        options.json.write_text(json.dumps(report.as_json(results, quality, verdicts), indent=1) + "\n")
    if report.broken(results, quality):
        return _BROKEN
    return _MISSED if any(each.met is False and not each.goal for each in verdicts) else 0


async def _measure(
    options: argparse.Namespace, extent: Extent
) -> tuple[dict[str, dict[str, Found]], dict[str, Any]]:
    results: dict[str, dict[str, Found]] = {}
    quality: dict[str, Any] = {}
    chosen = [model for model in models.ALL if model.name in options.models]
    for model in chosen:
        path = await model.locate()
        if set(options.parts) - {"quality"}:
            results[model.name] = await compare(model, path, options.subjects, extent, options.parts)
            if "speed" in options.parts:
                print(report.speed_table(model.name, results[model.name]) + "\n", flush=True)
        if "quality" in options.parts:
            quality[model.name] = await _quality(path, _QUICK_TEXTS if options.quick else _TEXTS)
    return results, quality


async def _quality(path: Path, texts: int) -> dict[str, Any]:
    """In a process of its own, which takes as much memory as the fp32 model, and gives it back."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"{__package__}.quality", str(path), str(texts)),
        env=environment(),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(), PATIENCE)
    except TimeoutError:
        return {"error": f"no answer within {PATIENCE:.0f} s"}
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        return {"error": err.decode(errors="replace").strip().rpartition("\n")[2]}
    told: dict[str, Any] = json.loads(out)
    return told


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench-engine", description=__doc__.partition("\n")[0])
    every = [model.name for model in models.ALL]
    for option, names in (("--models", every), ("--subjects", list(ADAPTERS)), ("--parts", list(PARTS))):
        parser.add_argument(
            option, type=_some_of(names), default=names, metavar="NAMES", help=f"of {','.join(names)}"
        )
    parser.add_argument("--rounds", type=int, metavar="N", help="of all that takes time; 3 unless told")
    parser.add_argument("--quick", action="store_true", help="a rough look: one round, shorter runs")
    parser.add_argument(
        "--no-prompt-lookup", action="store_true", help="ours without drafts, which peers do not make here"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there as well")
    return parser.parse_args()


def _some_of(names: Sequence[str]) -> Callable[[str], list[str]]:
    def chosen(text: str) -> list[str]:
        found = [name.strip() for name in text.split(",")]
        if unknown := [name for name in found if name not in names]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(names)}")
        return found

    return chosen


if __name__ == "__main__":
    sys.exit(main())
