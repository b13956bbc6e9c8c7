"""What the node can run models on, and how it is doing: CUDA devices through NVML, else the processor.

The one module that knows NVML. Readings may take a moment: the composition root takes them off the
event loop. Knows no model and promises no memory (see `memory`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from cortex.neuron import host
from cortex.neuron.host import CpuTimes, ReadText
from cortex.wire.node import Device

try:
    import pynvml
except ImportError:
    pynvml = None

MIB: Final = 2**20
CPU: Final = "cpu"
"""The uuid of the node's processor."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """How a device is doing now; None where it does not tell."""

    used_bytes: int
    free_bytes: int
    utilization_pct: float | None = None
    temp_c: float | None = None


class CudaFound(msgspec.Struct, frozen=True, kw_only=True):
    """What NVML told at start; `reason` is set where there are GPUs that cannot be used."""

    devices: tuple[Device, ...] = ()
    total_bytes: tuple[int, ...] = ()
    driver_version: str | None = None
    cuda_version: str | None = None
    reason: str | None = None


class Hardware:
    """The node's devices and their live readings.

    `devices` are what the node offers: its GPUs, or its processor where it has none. The processor can
    be named in a load on either kind of node, so `totals` and `read` always have it.
    """

    def __init__(
        self, *, nvml: Any = pynvml, read: ReadText = host.read_text, affinity: int | None = None
    ) -> None:
        self._nvml = nvml
        self._read = read
        self._times: CpuTimes | None = None
        machine = host.describe(read, host.usable_cores() if affinity is None else affinity)
        self.cores = machine.cores
        self.cuda = find_cuda(nvml)
        self.processor = Device(
            index=0,
            uuid=CPU,
            name=machine.name,
            vram_total_mb=machine.total_bytes // MIB,
            kind="cpu",
            cores=machine.cores,
        )
        self.devices: Sequence[Device] = self.cuda.devices or (self.processor,)
        uuids = [CPU, *(device.uuid for device in self.cuda.devices)]
        self.totals = dict(zip(uuids, (machine.total_bytes, *self.cuda.total_bytes), strict=True))

    def read(self) -> dict[str, Reading]:
        """Readings by uuid. A device that stopped answering is left out."""
        readings = {CPU: self._read_processor()}
        for device in self.cuda.devices:
            with contextlib.suppress(_nvml_error(self._nvml)):
                readings[device.uuid] = _read_gpu(self._nvml, device.uuid)
        return readings

    def _read_processor(self) -> Reading:
        total, free = host.memory(self._read)
        before, self._times = self._times, host.cpu_times(self._read("/proc/stat") or "")
        return Reading(
            used_bytes=total - free,
            free_bytes=free,
            utilization_pct=host.utilization(before, self._times),
            temp_c=host.temperature(self._read),
        )


def find_cuda(nvml: Any) -> CudaFound:
    """The GPUs that NVML knows. No library or no driver is a node without GPUs; what else hinders NVML
    is told as the reason why the GPUs cannot be used.
    """
    if nvml is None:
        return CudaFound()
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        if error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
            return CudaFound()
        if error.value == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
            return CudaFound(
                reason="The NVIDIA driver in the kernel and its libraries are of different versions; "
                "reboot, or unload the kernel modules and load them again."
            )
        return CudaFound(reason=f"NVML does not start: {error}.")
    try:
        handles = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
        version = nvml.nvmlSystemGetCudaDriverVersion_v2()
        return CudaFound(
            devices=tuple(_describe_gpu(nvml, index, handle) for index, handle in enumerate(handles)),
            total_bytes=tuple(nvml.nvmlDeviceGetMemoryInfo(handle).total for handle in handles),
            driver_version=_text(nvml.nvmlSystemGetDriverVersion()),
            cuda_version=f"{version // 1000}.{version % 1000 // 10}",
        )
    except nvml.NVMLError as error:
        return CudaFound(reason=f"NVML cannot list the GPUs: {error}.")


def _describe_gpu(nvml: Any, index: int, handle: Any) -> Device:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Device(
        index=index,
        uuid=_text(nvml.nvmlDeviceGetUUID(handle)),
        name=_text(nvml.nvmlDeviceGetName(handle)),
        vram_total_mb=nvml.nvmlDeviceGetMemoryInfo(handle).total // MIB,
        compute_capability=f"{major}.{minor}",
    )


def _read_gpu(nvml: Any, uuid: str) -> Reading:
    handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    utilization = temperature = None
    with _not_supported(nvml):
        utilization = float(nvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    with _not_supported(nvml):
        temperature = float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU))
    return Reading(
        used_bytes=memory.used, free_bytes=memory.free, utilization_pct=utilization, temp_c=temperature
    )


@contextlib.contextmanager
def _not_supported(nvml: Any) -> Iterator[None]:
    """Some devices have no such sensor; their other readings still count."""
    with contextlib.suppress(_nvml_error(nvml)):
        yield


def _nvml_error(nvml: Any) -> type[Exception]:
    error: type[Exception] = nvml.NVMLError
    return error


def _text(value: str | bytes) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
