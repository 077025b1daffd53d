# SPDX-License-Identifier: Apache-2.0
"""Keeps the cold-size estimates of VMs that nobody is attached to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from frostline.agent.mglru import ColdEstimate, Mglru
from frostline.agent.vm import Phase, Vm

ESTIMATE_SECONDS: Final = 60.0
# A VM that was not looked at yet does not wait for its turn, but a swarm of them is looked at together.
NEW_VM_SECONDS: Final = 5.0


class Estimates:
    """``refresh`` often; it looks at the kernel's lists now and then."""

    def __init__(self, mglru: Mglru | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._mglru: Final = mglru or Mglru()
        self._clock: Final = clock
        self._at = float("-inf")

    async def refresh(self, vms: Iterable[Vm]) -> None:
        """Bring the VMs' ``cold_estimate`` up to date: whoever is attached knows better, and has none."""
        unattached: list[Vm] = []
        for vm in vms:
            if vm.status is None and vm.phase is not Phase.STARTING:
                unattached.append(vm)
            else:
                vm.cold_estimate, vm.no_estimate_why = None, ""
        new = any(vm.cold_estimate is None and not vm.no_estimate_why for vm in unattached)
        now = self._clock()
        if not unattached or now - self._at < (NEW_VM_SECONDS if new else ESTIMATE_SECONDS):
            return
        self._at = now
        found = await asyncio.to_thread(self._mglru.estimates, [vm.vmm.process.pid for vm in unattached])
        for vm in unattached:
            answer = found[vm.vmm.process.pid]
            if isinstance(answer, ColdEstimate):
                vm.cold_estimate, vm.no_estimate_why = answer.within(vm.memory_bytes), ""
            else:
                vm.cold_estimate, vm.no_estimate_why = None, answer
