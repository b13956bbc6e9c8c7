from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cortex.neuron.hardware import CPU, Hardware, find_cuda
from cortex.wire.node import Device

GIB = 2**30
FILES = {
    "/proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB\n",
    "/proc/cpuinfo": "model name : Test CPU\n",
    "/proc/stat": "cpu 10 0 10 80 0 0 0 0\n",
}


class NVMLError(Exception):
    def __init__(self, value: int) -> None:
        super().__init__(f"error {value}")
        self.value = value


class FakeNvml:
    """The calls of NVML's bindings that a node makes, over two made-up cards."""

    NVMLError = NVMLError
    NVML_ERROR_LIBRARY_NOT_FOUND = 12
    NVML_ERROR_DRIVER_NOT_LOADED = 9
    NVML_ERROR_LIB_RM_VERSION_MISMATCH = 18
    NVML_TEMPERATURE_GPU = 0

    def __init__(self, *, fails_with: int | None = None, silent: frozenset[str] = frozenset()) -> None:
        self.fails_with = fails_with
        self.silent = silent

    def nvmlInit(self) -> None:
        if self.fails_with is not None:
            raise NVMLError(self.fails_with)

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return f"GPU-{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid in self.silent:
            raise NVMLError(15)
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> bytes:
        return handle.encode()

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "Fake 5090"

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:
        return (12, 0)

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(total=32 * GIB, used=2 * GIB, free=30 * GIB)

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        if handle == "GPU-1":
            raise NVMLError(3)
        return SimpleNamespace(gpu=71)

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 64

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.1"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:
        return 13010


def test_without_nvml_the_processor_is_the_one_device() -> None:
    hardware = Hardware(nvml=None, read=FILES.get, affinity=4)
    assert hardware.devices == (
        Device(index=0, uuid=CPU, name="Test CPU", vram_total_mb=8192, kind="cpu", cores=4),
    )
    assert hardware.totals == {CPU: 8 * GIB}
    assert hardware.cuda.reason is None


def test_gpus_are_named_by_uuid_and_the_processor_stays_available() -> None:
    hardware = Hardware(nvml=FakeNvml(), read=FILES.get, affinity=4)
    assert [(d.index, d.uuid, d.compute_capability, d.vram_total_mb) for d in hardware.devices] == [
        (0, "GPU-0", "12.0", 32768),
        (1, "GPU-1", "12.0", 32768),
    ]
    assert hardware.totals == {CPU: 8 * GIB, "GPU-0": 32 * GIB, "GPU-1": 32 * GIB}
    assert (hardware.cuda.driver_version, hardware.cuda.cuda_version) == ("580.1", "13.1")


@pytest.mark.parametrize(
    "absent", [FakeNvml.NVML_ERROR_LIBRARY_NOT_FOUND, FakeNvml.NVML_ERROR_DRIVER_NOT_LOADED]
)
def test_no_library_or_driver_is_a_cpu_node_without_complaint(absent: int) -> None:
    assert find_cuda(FakeNvml(fails_with=absent)).reason is None


def test_a_driver_mismatch_is_told() -> None:
    hardware = Hardware(nvml=FakeNvml(fails_with=18), read=FILES.get, affinity=4)
    assert hardware.devices[0].kind == "cpu"
    assert "different versions" in (hardware.cuda.reason or "")


def test_any_other_trouble_is_told_too() -> None:
    assert find_cuda(FakeNvml(fails_with=999)).reason == "NVML does not start: error 999."


def test_readings_of_every_device_with_what_it_can_tell() -> None:
    readings = Hardware(nvml=FakeNvml(), read=FILES.get, affinity=4).read()
    assert readings[CPU].used_bytes == readings[CPU].free_bytes == 4 * GIB
    assert (readings["GPU-0"].free_bytes, readings["GPU-0"].utilization_pct) == (30 * GIB, 71.0)
    assert (readings["GPU-1"].utilization_pct, readings["GPU-1"].temp_c) == (None, 64.0)


def test_a_device_that_stopped_answering_is_left_out() -> None:
    nvml = FakeNvml()
    hardware = Hardware(nvml=nvml, read=FILES.get, affinity=4)
    nvml.silent = frozenset({"GPU-0"})
    assert set(hardware.read()) == {CPU, "GPU-1"}


def test_this_machine_has_a_device() -> None:
    hardware = Hardware()
    assert hardware.devices
    assert hardware.read()[CPU].free_bytes > 0
