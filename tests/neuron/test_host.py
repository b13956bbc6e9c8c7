from __future__ import annotations

from collections.abc import Mapping

import pytest

from cortex.neuron import host
from cortex.neuron.host import CpuTimes, ReadText

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    9000000 kB\n"
CPUINFO = "processor\t: 0\nmodel name\t: Some Processor 3000\nflags\t: a b\n"


def reader(files: Mapping[str, str]) -> ReadText:
    return files.get


def test_a_plain_machine() -> None:
    machine = host.describe(reader({"/proc/meminfo": MEMINFO, "/proc/cpuinfo": CPUINFO}), affinity=8)
    assert machine == host.Host(name="Some Processor 3000", cores=8, total_bytes=16_000_000 * 1024)


def test_free_memory_is_what_the_kernel_can_give_not_what_lies_idle() -> None:
    assert host.memory(reader({"/proc/meminfo": MEMINFO})) == (16_000_000 * 1024, 9_000_000 * 1024)


def test_a_group_of_version_2_bounds_memory_and_cores() -> None:
    files = {
        "/proc/meminfo": MEMINFO,
        "/proc/self/cgroup": "0::/system.slice/neuron.service\n",
        "/sys/fs/cgroup/system.slice/memory.max": "4000000000\n",
        "/sys/fs/cgroup/system.slice/memory.current": "3000000000\n",
        "/sys/fs/cgroup/system.slice/memory.stat": "anon 1\ninactive_file 500000000\n",
        "/sys/fs/cgroup/system.slice/neuron.service/memory.max": "max\n",
        "/sys/fs/cgroup/system.slice/neuron.service/cpu.max": "250000 100000\n",
    }
    assert host.memory(reader(files)) == (4_000_000_000, 1_500_000_000)
    assert host.describe(reader(files), affinity=8).cores == 2


def test_a_container_sees_its_limits_at_the_mounts_root() -> None:
    files = {
        "/proc/meminfo": MEMINFO,
        "/proc/self/cgroup": "0::/../../docker/abc\n",
        "/sys/fs/cgroup/memory.max": "2000000000\n",
        "/sys/fs/cgroup/cpu.max": "50000 100000\n",
    }
    assert host.memory(reader(files)) == (2_000_000_000, 2_000_000_000)
    assert host.describe(reader(files), affinity=4).cores == 1


def test_a_group_of_version_1_bounds_memory_and_cores() -> None:
    files = {
        "/proc/meminfo": MEMINFO,
        "/proc/self/cgroup": "4:memory:/box\n2:cpu,cpuacct:/box\n1:name=systemd:/\n",
        "/sys/fs/cgroup/memory/box/memory.limit_in_bytes": "3000000000\n",
        "/sys/fs/cgroup/memory/box/memory.usage_in_bytes": "1000000000\n",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "/sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_quota_us": "300000\n",
        "/sys/fs/cgroup/cpu,cpuacct/box/cpu.cfs_period_us": "100000\n",
    }
    assert host.memory(reader(files)) == (3_000_000_000, 2_000_000_000)
    assert host.describe(reader(files), affinity=16).cores == 3


def test_no_quota_is_no_limit() -> None:
    assert (
        host.cpu_quota(reader({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}))
        is None
    )
    assert host.cpu_quota(reader({})) is None


@pytest.mark.parametrize(
    ("cpuinfo", "name"),
    [(CPUINFO, "Some Processor 3000"), ("Model\t\t: Raspberry Pi 5\n", "Raspberry Pi 5"), ("", "CPU")],
)
def test_the_processors_name(cpuinfo: str, name: str) -> None:
    assert host.cpu_name(cpuinfo) == name


def test_utilization_counts_ticks_between_two_readings() -> None:
    before = host.cpu_times("cpu  100 0 100 700 100 0 0 0 0 0\ncpu0 1 2 3\n")
    after = host.cpu_times("cpu  150 0 150 800 100 0 0 0 0 0\n")
    assert before == CpuTimes(busy=200, total=1000)
    assert host.utilization(before, after) == 50.0
    assert host.utilization(None, after) is None
    assert host.utilization(after, after) is None
    assert host.cpu_times("") is None


def test_temperature_of_the_processors_own_sensor() -> None:
    files = {
        "/sys/class/hwmon/hwmon0/name": "nvme\n",
        "/sys/class/hwmon/hwmon0/temp1_input": "30000\n",
        "/sys/class/hwmon/hwmon1/name": "k10temp\n",
        "/sys/class/hwmon/hwmon1/temp1_input": "61500\n",
    }
    assert host.temperature(reader(files)) == 61.5
    assert host.temperature(reader({})) is None


def test_a_missing_file_reads_as_none() -> None:
    assert host.read_text("/proc/there/is/no/such/file") is None


def test_this_machine_can_be_described() -> None:
    machine = host.describe(host.read_text, host.usable_cores())
    assert machine.cores >= 1
    assert machine.total_bytes > 2**28
