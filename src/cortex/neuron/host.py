"""The node's own processor and memory: name, cores and bytes, within the limits of its control group.

Parsers of what Linux tells under /proc and /sys, given a way to read those files. Knows no GPU and no
model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import msgspec

ReadText = Callable[[str], str | None]
"""The content of a file, None if there is none to read."""

_UNLIMITED: Final = 2**60
"""Bytes. Control groups of version 1 write "no limit" as a number of this order."""
_CPU_SENSORS: Final = {"coretemp", "k10temp", "zenpower", "cpu_thermal"}
_MAX_SENSORS: Final = 16


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What the machine is. Bytes that this process may use, cores that it may run on."""

    name: str
    cores: int
    total_bytes: int


class CpuTimes(msgspec.Struct, frozen=True):
    """Ticks since start, of all cores together."""

    busy: int
    total: int


def read_text(path: str) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def describe(read: ReadText, affinity: int) -> Host:
    """The machine, seen from this process. `affinity` counts the cores that it may be scheduled on."""
    quota = cpu_quota(read)
    cores = affinity if quota is None else min(affinity, max(1, int(quota)))
    total, _ = memory(read)
    return Host(name=cpu_name(read("/proc/cpuinfo") or ""), cores=max(1, cores), total_bytes=total)


def usable_cores() -> int:
    return len(os.sched_getaffinity(0))


def cpu_name(cpuinfo: str) -> str:
    for key in ("model name", "Hardware", "Model"):
        found = re.search(rf"^{key}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return "CPU"


def memory(read: ReadText) -> tuple[int, int]:
    """Bytes that this process may use in all, and bytes of them that are free now."""
    lines: list[tuple[str, str]] = re.findall(
        r"^(\w+):\s+(\d+) kB", read("/proc/meminfo") or "", re.MULTILINE
    )
    fields = dict(lines)
    total = int(fields.get("MemTotal", 0)) * 1024
    free = int(fields.get("MemAvailable", fields.get("MemFree", 0))) * 1024
    for limit, used in _memory_limits(read):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return total, free


def cpu_quota(read: ReadText) -> float | None:
    """Cores' worth of time that the control groups allow, None if they set no limit."""
    quotas = []
    for folder in _group_folders(read, "cpu"):
        pair = read(f"{folder}/cpu.max")
        if pair is None:
            pair = f"{read(f'{folder}/cpu.cfs_quota_us')} {read(f'{folder}/cpu.cfs_period_us')}"
        found = re.match(r"(\d+) +(\d+)", pair.replace("\n", ""))
        if found and int(found[2]):
            quotas.append(int(found[1]) / int(found[2]))
    return min(quotas, default=None)


def cpu_times(stat: str) -> CpuTimes | None:
    """Of /proc/stat's first line. Idle and waiting for a disk are not busy; guests are counted in user."""
    found = re.match(r"cpu\s+([\d ]+)", stat)
    ticks = [int(tick) for tick in found.group(1).split()][:8] if found else []
    if len(ticks) < 5:
        return None
    return CpuTimes(sum(ticks) - ticks[3] - ticks[4], sum(ticks))


def utilization(before: CpuTimes | None, now: CpuTimes | None) -> float | None:
    """Percent of all cores between two readings."""
    if before is None or now is None or now.total <= before.total:
        return None
    return round(100 * (now.busy - before.busy) / (now.total - before.total), 1)


def temperature(read: ReadText) -> float | None:
    """Degrees Celsius of the first processor sensor, None on machines that have none."""
    for index in range(_MAX_SENSORS):
        sensor = f"/sys/class/hwmon/hwmon{index}"
        if (read(f"{sensor}/name") or "").strip() in _CPU_SENSORS:
            value = (read(f"{sensor}/temp1_input") or "").strip()
            return int(value) / 1000 if value.lstrip("-").isdecimal() else None
    return None


def _memory_limits(read: ReadText) -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group above this process that has a limit.

    File pages that nobody used lately are given back under pressure, so they do not count as used.
    """
    for folder in _group_folders(read, "memory"):
        for limit_file, used_file, inactive in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            limit = (read(f"{folder}/{limit_file}") or "").strip()
            if not limit.isdecimal() or int(limit) >= _UNLIMITED:
                continue
            used = (read(f"{folder}/{used_file}") or "0").strip()
            cached = re.search(rf"^{inactive} (\d+)$", read(f"{folder}/memory.stat") or "", re.MULTILINE)
            yield int(limit), max(0, int(used) - (int(cached.group(1)) if cached else 0))


def _group_folders(read: ReadText, controller: str) -> Iterator[str]:
    """Folders of the control groups that bind this process, innermost first.

    Inside a container the path may name a group that only the host sees; the mount's root is then ours.
    """
    for line in (read("/proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            roots = ("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
        elif controller in controllers.split(","):
            roots = (f"/sys/fs/cgroup/{controllers}", f"/sys/fs/cgroup/{controller}")
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for depth in range(len(parts), -1, -1):
            for root in dict.fromkeys(roots):
                yield "/".join((root, *parts[:depth]))
