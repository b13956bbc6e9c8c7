"""Child processes: readiness, the end, and that nothing outlives its parent."""

import asyncio
import os
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from cortex.cli.children import Child, first_end, start_child

SAYS_READY = """
import os, socket, time
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.sendto(b"READY=1", "\\0" + os.environ["NOTIFY_SOCKET"][1:])
"""
IGNORES_TERM = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SAYS_READY + "time.sleep(60)"
)


async def python(code: str, log: Path | None = None) -> Child:
    return await start_child("helper", [sys.executable, "-S", "-c", code], os.environ, log)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_a_child_is_ready_when_it_says_so_and_ends_when_it_is_told() -> None:
    child = await python(SAYS_READY + "time.sleep(60)")
    await child.ready()
    await child.stop(10)
    assert await child.ended() == -signal.SIGTERM
    assert not alive(child.pid)


async def test_a_child_that_does_not_listen_is_killed() -> None:
    child = await python(IGNORES_TERM)
    await child.ready()
    await child.stop(0.01)
    assert await child.ended() == -signal.SIGKILL


async def test_what_a_child_leaves_in_its_group_goes_with_it() -> None:
    child = await python("import os, time\nif os.fork(): os._exit(0)\n" + SAYS_READY + "time.sleep(60)")
    await child.ready()
    assert await child.ended() == 0
    (left,) = running_in_group(child.pid)
    watch = os.pidfd_open(left)
    await child.stop(1)
    assert ends(watch)


def running_in_group(group: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[2]) == group:
                found.append(int(entry.parent.name))
    return found


def ends(pidfd: int) -> bool:
    """True when the process behind `pidfd` ends within ten seconds."""
    try:
        return bool(select.select([pidfd], [], [], 10)[0])
    finally:
        os.close(pidfd)


async def test_the_first_end_is_told_with_the_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    stays = await python("import time; time.sleep(60)")
    goes = await python("print(*range(40), sep='\\n'); raise SystemExit(3)", log)
    ended = await first_end([stays, goes])
    assert ended is goes
    failure = ended.obituary()
    assert failure.message == f"the helper ended with status 3; all it said is in {log}, at last:"
    assert failure.more == [str(number) for number in range(28, 40)]
    await asyncio.gather(stays.stop(1), goes.stop(1))


async def test_a_program_that_is_not_there_is_one_line() -> None:
    with pytest.raises(Exception, match=r"cannot start the helper: .*nonesuch"):
        await start_child("helper", ["/nonesuch"], os.environ, None)


PARENT = """
import asyncio, os, sys
from cortex.cli.children import start_child

async def main():
    child = await start_child("helper", [sys.executable, "-S", "-c", sys.argv[1]], os.environ, None)
    await child.ready()
    print(child.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_killed_parent_leaves_no_child() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, IGNORES_TERM], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        watch = os.pidfd_open(child)
        parent.kill()
    assert ends(watch)
