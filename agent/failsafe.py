# SPDX-License-Identifier: Apache-2.0
"""The last step of the ladder: with the controller gone for long, everything comes back if RAM allows.

Leases run out by themselves, and the pagers then hold. After ``drain_after_seconds`` without a session the VMs are
drained one after the other, each only while the host has the RAM for what the VM has away and a reserve on top.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import structlog

from frostline.agent.procfs import HostMemory
from frostline.agent.vm import Phase, Vm
from frostline.native import Command, CommandKind, State
from frostline.wire.units import format_duration, format_size

# Share of the host's RAM that must stay available after a VM's pages are back.
RESERVE: Final = 0.05

_log: Final = structlog.stdlib.get_logger("frostline.agent.failsafe")


def next_to_drain(vms: Iterable[Vm], memory: HostMemory) -> tuple[Vm | None, str]:
    """The VM to drain now, or None and why not. The one with the least away first: it is soonest done."""
    served = [vm for vm in vms if vm.phase is Phase.SERVED and vm.status is not None]
    if any(vm.status is not None and vm.status.state is State.DRAIN for vm in served):
        return None, ""
    away = sorted((vm for vm in served if vm.evicted_bytes > 0), key=lambda vm: vm.evicted_bytes)
    if not away:
        return None, ""
    free = memory.available_bytes - int(memory.total_bytes * RESERVE)
    if away[0].evicted_bytes > free:
        return None, (
            f"{format_size(away[0].evicted_bytes)} of {away[0].vmm.name} would come back, "
            f"but only {format_size(max(0, free))} of RAM is free above the reserve"
        )
    return away[0], ""


class Failsafe:
    """Call ``watch`` every cycle."""

    def __init__(self, drain_after_seconds: float) -> None:
        self._after_seconds: Final = drain_after_seconds
        self._said = ""

    async def watch(self, disconnected_seconds: float, vms: Iterable[Vm], memory: HostMemory) -> None:
        if disconnected_seconds < self._after_seconds:
            self._said = ""
            return
        vm, why_not = next_to_drain(vms, memory)
        if why_not and why_not != self._said:
            _log.warning("the controller is gone, and pages cannot come back for lack of RAM", why=why_not)
        self._said = why_not
        if vm is None:
            return
        problem = await vm.tell(Command(CommandKind.DRAIN))
        _log.warning(
            "the controller is gone for long; draining",
            vm=vm.vmm.name,
            vm_id=vm.vm_id,
            gone_for=format_duration(round(disconnected_seconds)),
            evicted_bytes=vm.evicted_bytes,
            problem=problem or None,
        )
