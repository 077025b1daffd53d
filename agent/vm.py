# SPDX-License-Identifier: Apache-2.0
"""One VM: what the agent knows of it, and what it can be told. How it is kept served is in `lifecycle`."""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import structlog

from frostline.agent.budgets import Grant, VmFacts, min_age_ns
from frostline.agent.discovery import Vmm
from frostline.agent.mglru import ColdEstimate
from frostline.agent.pager import PagerLink, PagerProcess
from frostline.agent.vault import VaultReader
from frostline.native import Command, CommandKind, NativeError, Record, Refusal, Reply, Status

SERVED_ELSEWHERE: Final = "another agent's pager serves this VM"

_log: Final = structlog.stdlib.get_logger("frostline.agent.vm")


class Phase(StrEnum):
    """Where a VM stands with us."""

    IDLE = "idle"  # not attached: policy, host limits, or nothing decided yet
    STARTING = "starting"
    SERVED = "served"
    REFUSED = "refused"
    FOREIGN = "foreign"  # another agent's pager serves it
    DETACHING = "detaching"
    GONE = "gone"


class Held(StrEnum):
    """What somebody on this host asked for; it goes before policy."""

    NOT = ""
    DRAINED = "drained"
    DETACHED = "detached"


class Vm:
    """``on_change`` is called when something happened that a report should not wait for."""

    def __init__(self, vmm: Vmm, vm_id: str, link: PagerLink, on_change: Callable[[Vm], None]) -> None:
        self.vmm: Final = vmm
        self.vm_id = vm_id
        self.vm_class = ""
        self.phase = Phase.IDLE
        self.refusal = Refusal.NONE
        self.refusal_detail = ""
        self.grant: Grant | None = None
        self.grant_version = 0
        self.pager_restarts = 0
        self.last_takeover_seconds = 0.0
        self.cold_estimate: ColdEstimate | None = None  # only while nobody is attached
        self.no_estimate_why = ""
        self.discovered_at: Final = time.monotonic()
        self._wanted = False
        self._forbidden = False
        self._held = Held.NOT
        self._lease_until_ns = 0
        self._inspected_bytes = 0
        self._on_change: Final = on_change
        self._wake: Final = asyncio.Event()
        self._link: Final = link
        self._vault: Final = VaultReader(vmm.process.pid)
        # Before anything is decided or reported: what an earlier agent attached to is neither unwanted nor empty.
        self._vault.open()
        self._pager: PagerProcess | None = None
        self._not_before = 0.0
        self._log = _log.bind(vm=vmm.name, vm_id=vm_id, pid=vmm.process.pid)

    @property
    def status(self) -> Status | None:
        """As last read; None while nobody is attached."""
        return self._vault.status

    @property
    def wanted(self) -> bool:
        return self._wanted and self._held is not Held.DETACHED

    @property
    def held(self) -> Held:
        """What somebody on this host asked for; it stays so until ``resume``."""
        return self._held

    @property
    def pager_pid(self) -> int:
        return self._pager.pid if self._pager and not self._pager.gone else 0

    @property
    def memory_bytes(self) -> int:
        if self.status and self.status.memory_bytes:
            return self.status.memory_bytes
        return self._inspected_bytes or self.vmm.memory_bytes

    @property
    def evicted_bytes(self) -> int:
        return self.status.evicted_bytes if self.status else 0

    @property
    def facts(self) -> VmFacts:
        detail = self.refusal_detail if self.phase is Phase.REFUSED else ""
        return VmFacts(
            self.vm_id,
            self.vmm.uuid,
            self.vmm.name,
            self.memory_bytes,
            detail,
            foreign=self.phase is Phase.FOREIGN,
            held=self._held.value,
        )

    def rename(self, vm_id: str) -> None:
        """The id changes when another VM with the same UUID appears or goes."""
        self.vm_id = vm_id
        self._log = _log.bind(vm=self.vmm.name, vm_id=vm_id, pid=self.vmm.process.pid)

    def want(self, attach: bool, forbidden: bool = False) -> None:
        """Whether this VM should be attached to; a VM that should not is drained and detached.

        ``forbidden``: by the host's own limits. Then it is not even rescued from another agent's dead pager.
        """
        if (attach, forbidden) != (self._wanted, self._forbidden):
            self._wanted, self._forbidden = attach, forbidden
            self._not_before = 0.0
            self._wake.set()

    async def hold(self, how: Held) -> str:
        """Drain or detach, and keep it so until ``resume`` whatever policy says; gives back what went wrong."""
        if self.phase is Phase.FOREIGN:
            return SERVED_ELSEWHERE
        self._held = how
        self._not_before = 0.0
        self._wake.set()
        return await self.apply()

    async def resume(self) -> str:
        """Back into the policy's hands."""
        self._held = Held.NOT
        self._not_before = 0.0
        self._wake.set()
        return await self.apply()

    def read(self) -> tuple[list[Record], int]:
        """Read the vault: the status is kept here, new records and the number of lost ones are given back."""
        return self._vault.read()

    def read_status(self) -> None:
        """Read the vault's status, if there is a vault."""
        self._vault.refresh()

    def set_grant(self, grant: Grant, version: int, lease_until_ns: int) -> None:
        """Remember what holds from now on; ``apply`` brings it to the pager."""
        self.grant, self.grant_version, self._lease_until_ns = grant, version, lease_until_ns

    async def apply(self, scan_interval_ms: int = 0) -> str:
        """Bring the grant to the pager. Gives back what went wrong, empty when nothing did."""
        if self._held is Held.DRAINED and self.phase is Phase.SERVED:
            return await self.tell(Command(CommandKind.DRAIN))
        if self.grant is None or self.phase is not Phase.SERVED or not self.grant.attach:
            return ""
        if self._pager is None or self._pager.gone:
            return ""  # the next pager gets it as soon as it serves
        lease_ns = max(0, self._lease_until_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        command = Command(
            CommandKind.BUDGET,
            budget_bytes=self.grant.bytes if lease_ns else 0,
            rate_bytes=self.grant.rate_bytes_per_second,
            lease_ns=lease_ns,
            generation=self.grant_version,
            min_age_ns=min_age_ns(self.grant.min_age_seconds),
            scan_interval_ms=scan_interval_ms,
        )
        return await self.tell(command)

    async def tell(self, command: Command) -> str:
        """Send a command; gives back what went wrong, empty when the pager took it."""
        if self.phase is Phase.FOREIGN:
            return SERVED_ELSEWHERE
        if self._pager is None or self._pager.gone:
            return "no pager serves this VM now"
        try:
            reply: Reply = await self._link.call(command)
        except NativeError as error:
            return str(error)
        return f"{errno.errorcode.get(reply.error, reply.error)}: {reply.detail}" if reply.error else ""

    def _set_phase(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            self._on_change(self)
