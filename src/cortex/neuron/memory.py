"""The ledger: which model was promised how many bytes on which device.

A load is granted all of its bytes on all of its devices, or none, before anything of it starts. The
ledger measures nothing: it holds promises against budgets, and is told what is free when that matters.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from cortex.wire.errors import BadRequest, Conflict
from cortex.wire.node import Grant

MIB: Final = 2**20


def budget_of(total: int, *, floor: int, share: float = 1.0) -> int:
    """Bytes of a device that models may take: its share of `total`, less a floor for everyone else."""
    return max(0, int(total * share) - floor)


class Ledger:
    """Grants of bytes per device, never together over a device's budget."""

    def __init__(self, budgets: Mapping[str, int]) -> None:
        self._budgets = dict(budgets)
        self._grants: dict[str, dict[str, int]] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._budgets)

    @property
    def grants(self) -> list[Grant]:
        return [
            Grant(model_id=model_id, device=device, bytes=size)
            for model_id, devices in self._grants.items()
            for device, size in devices.items()
        ]

    def budget(self, device: str) -> int:
        return self._budgets[device]

    def granted(self, device: str) -> int:
        return sum(devices.get(device, 0) for devices in self._grants.values())

    def free(self, device: str) -> int:
        return self._budgets[device] - self.granted(device)

    def grant(
        self, model_id: str, bytes_per_device: Mapping[str, int], available: Mapping[str, int] | None = None
    ) -> None:
        """Promise `bytes_per_device` to a model, or nothing at all.

        `available` is what the devices measure as free right now, where the caller knows it: memory
        that programs outside this node hold cannot be promised either.

        Raises BadRequest for a device that the node does not have, Conflict where a device has no room
        (its details carry the ledger of the devices asked), ValueError if the model holds a grant.
        """
        if model_id in self._grants:
            raise ValueError(f"{model_id} holds a grant already")
        if any(size < 0 for size in bytes_per_device.values()):
            raise ValueError("bytes cannot be negative")
        for device in bytes_per_device:
            if device not in self._budgets:
                known = ", ".join(self._budgets)
                raise BadRequest(f"This node has no device {device!r}; it has {known}.", param="devices")
        measured = available or {}
        for device, asked in bytes_per_device.items():
            room = min(self.free(device), measured.get(device, self.free(device)))
            if asked > room:
                raise self._no_room(model_id, device, bytes_per_device, measured)
        self._grants[model_id] = dict(bytes_per_device)

    def release(self, model_id: str) -> None:
        """Take a model's grant back; a model without one is ignored."""
        self._grants.pop(model_id, None)

    def _no_room(
        self, model_id: str, device: str, asked: Mapping[str, int], measured: Mapping[str, int]
    ) -> Conflict:
        held = ", ".join(f"{g.model_id} {_mb(g.bytes)}" for g in self.grants if g.device == device)
        outside = ""
        if device in measured and measured[device] < min(asked[device], self.free(device) + 1):
            outside = f" Only {_mb(measured[device])} of the device are free of other programs' memory."
        rows = [
            {
                "device": name,
                "budget_bytes": self.budget(name),
                "granted_bytes": self.granted(name),
                "free_bytes": self.free(name),
                "asked_bytes": size,
                **({"available_bytes": measured[name]} if name in measured else {}),
                "granted": [
                    {"model_id": grant.model_id, "bytes": grant.bytes}
                    for grant in self.grants
                    if grant.device == name
                ],
            }
            for name, size in asked.items()
        ]
        return Conflict(
            f"No room for {model_id} on {device}: it asks for {_mb(asked[device])}, and "
            f"{_mb(self.free(device))} of {_mb(self.budget(device))} are not promised yet "
            f"(granted: {held or 'nothing'}).{outside} Unload a model, or ask for less with memory_mb.",
            code="no_room",
            details={"ledger": rows},
        )


def _mb(size: int) -> str:
    return f"{size / MIB:,.0f} MB"
