"""Traffic of all kinds on a node with real workers: nothing leaks, nothing hangs, everybody is answered once.

The long one takes ten minutes and is run by `make soak`; SOAK_SECONDS sets another length, SOAK_SEED other
traffic.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from soaking import KINDS, Soak

GROWTH, SLACK = 1.05, 2**20


pytestmark = pytest.mark.usefixtures("own_warm_server")


@pytest.mark.slow
async def test_some_seconds_of_traffic_and_kills_leave_nothing_behind(models_dir: Path) -> None:
    soak = Soak(models_dir, seed=1, bound_s=15.0)
    async with soak.started():
        await soak.traffic(3.0, kill_every_s=0.9)
        await soak.traffic(1.0, kill_every_s=None)
        await soak.check()
    assert soak.kills >= 1
    assert soak.asked > 50
    assert set(KINDS) - set(soak.kinds) <= {"oversize", "nonsense"}, "of which there are few"
    assert {"ok", "left"} <= set(soak.outcomes)


@pytest.mark.long
@pytest.mark.timeout(0)
async def test_minutes_of_traffic_and_kills_leave_nothing_behind(
    models_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Workers are killed in the first two parts, between whose ends the node must not grow. After that one
    worker lives, has all its buffers at the end of the third part, and must not grow in the fourth.
    """
    seconds = float(os.environ.get("SOAK_SECONDS", "600"))
    soak = Soak(models_dir, seed=int(os.environ.get("SOAK_SEED", "1")), bound_s=60.0)
    memory = []
    async with soak.started():
        for share, kills in ((0.2, True), (0.2, True), (0.25, False), (0.35, False)):
            await soak.traffic(seconds * share, kill_every_s=max(2.0, seconds / 50) if kills else None)
            await soak.check()
            memory.append(soak.memory())
            with capsys.disabled():
                sys.stdout.write(f"\n{soak.told()}\n")
                sys.stdout.flush()
    assert soak.kills >= 2
    assert min(soak.outcomes[name] for name in ("ok", "left", "bad", "failed", "refused")) > 0
    assert soak.factory.preemptions > 0
    killed, after_kills, warm_worker, end = memory
    assert after_kills["node"] <= killed["node"] * GROWTH, "the node grew while workers were killed"
    for name, size in warm_worker.items():
        assert end[name] <= size * GROWTH + SLACK, (
            f"the memory of {name} grew from {size} to {end[name]} bytes"
        )
