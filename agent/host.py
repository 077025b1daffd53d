# SPDX-License-Identifier: Apache-2.0
"""The VMs of this host, side by side, coming and going."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Final

import structlog

from frostline.agent.discovery import Discovery, vm_ids
from frostline.agent.lifecycle import ManagedVm
from frostline.agent.pager import PagerOptions, trim_log
from frostline.agent.procfs import ProcessId, process_id
from frostline.agent.vm import Phase, Vm

# More VMs than a host can have; what is beyond is not served, and that is said.
MAX_VMS: Final = 1024
# Logs of VMs that have ended, the newest of them, for whoever wants to know why.
MAX_ENDED_LOGS: Final = 64

_log: Final = structlog.stdlib.get_logger("frostline.agent.host")


class Host:
    """Owns a ManagedVm for each VMM process that was found."""

    def __init__(self, node_id: str, options: Callable[[], PagerOptions], on_change: Callable[[Vm], None]) -> None:
        self.node_id: Final = node_id
        self._options: Final = options
        self._on_change: Final = on_change
        self._discovery: Final = Discovery()
        self._vms: dict[ProcessId, ManagedVm] = {}
        self._doubled: set[str] = set()
        self._overflow = False

    def __iter__(self) -> Iterator[ManagedVm]:
        """Every VM that has not ended."""
        return iter([vm for vm in self._vms.values() if vm.phase is not Phase.GONE])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def by_id(self) -> dict[str, ManagedVm]:
        return {vm.vm_id: vm for vm in self}

    def find(self, wanted: str) -> list[ManagedVm]:
        """The VMs with this id, UUID, name or pid."""
        exact = [vm for vm in self if wanted in (vm.vm_id, vm.vmm.uuid)]
        return exact or [vm for vm in self if wanted in (vm.vmm.name, str(vm.vmm.process.pid))]

    async def discover(self) -> tuple[list[ManagedVm], list[ManagedVm]]:
        """Look for VMs; gives back those that are new, and those that have ended and are now forgotten."""
        found = await asyncio.to_thread(self._discovery.sweep)
        if len(found) > MAX_VMS and not self._overflow:
            _log.error("too many VMs; the rest is not served", found=len(found), most=MAX_VMS)
        self._overflow = len(found) > MAX_VMS
        found = found[:MAX_VMS]
        ids, doubled = vm_ids(found, self.node_id)
        for uuid in sorted(doubled - self._doubled):
            names = [f"{vmm.name} (pid {vmm.process.pid})" for vmm in found if vmm.uuid == uuid]
            _log.warning("VMs with one UUID; both go by their pids until one leaves", uuid=uuid, vms=names)
        self._doubled = doubled
        new = []
        for vmm in found:
            vm = self._vms.get(vmm.process)
            if vm is None:
                vm = ManagedVm(vmm, ids[vmm.process], self._options, self._on_change)
                self._vms[vmm.process] = vm
                new.append(vm)
                _log.info("found a VM", vm=vmm.name, vm_id=vm.vm_id, pid=vmm.process.pid, program=vmm.executable)
            elif vm.vm_id != ids[vmm.process]:
                vm.rename(ids[vmm.process])
        gone = [vm for vm in self._vms.values() if vm.task.done()]
        for vm in gone:
            del self._vms[vm.vmm.process]
            vm.task.result()  # a task that fell over must not do so in silence
        return new, gone

    def tidy(self) -> None:
        """Keep pagers' logs from growing without end, and clear away what ended VMs left in the run folder."""
        options = self._options()
        for path in options.socket_dir.glob("*-*.sock"):
            if not _lives(path.stem):
                path.unlink(missing_ok=True)
        if options.log_dir is None:
            return
        ended = []
        for path in options.log_dir.glob("*-*.log*"):
            if _lives(path.name.partition(".")[0]):
                trim_log(path)
            else:
                ended.append(path)
        ended.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        for path in ended[MAX_ENDED_LOGS:]:
            path.unlink(missing_ok=True)

    async def stop(self) -> None:
        """Stop supervising. Pagers live on."""
        await asyncio.gather(*(vm.stop() for vm in self._vms.values()), return_exceptions=True)


def _lives(name: str) -> bool:
    """Whether the process that a file of the run folder is named after (pid-start time) still runs."""
    pid, _, start = name.partition("-")
    if not (pid.isdecimal() and start.isdecimal()):
        return True  # not ours to judge
    return process_id(int(pid)) == ProcessId(int(pid), int(start))
