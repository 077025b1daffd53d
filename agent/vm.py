# SPDX-License-Identifier: Apache-2.0
"""One VM's life with us: attach, keep a pager alive, apply budgets, detach.

Each VM has a task that is woken by what happens (its VMM or its pager ended, somebody changed their mind) and then
takes the one step that the present state calls for. A pager's death wakes it through the pidfd, so the next pager
starts within milliseconds, whatever the rest of the agent is doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import signal
import time
from collections.abc import Callable
from enum import StrEnum
from typing import Final

import structlog

from frostline.agent.backoff import RESTART_MOST_SECONDS, STABLE_SECONDS, RestartBackoff
from frostline.agent.budgets import Grant, VmFacts, min_age_scans
from frostline.agent.discovery import Vmm
from frostline.agent.pager import (
    Ending,
    PagerLink,
    PagerOptions,
    PagerProcess,
    adopt_pager,
    start_pager,
)
from frostline.agent.processes import ProcessWatch
from frostline.agent.vault import VaultReader
from frostline.native import (
    Command,
    CommandKind,
    Inspection,
    NativeError,
    Record,
    Refusal,
    Reply,
    State,
    Status,
    inspect,
)

# A refused VM is looked at again this often; while it has pages away, far more often, for its vCPUs may hang.
REFUSED_SECONDS: Final = 30.0
REFUSED_AWAY_SECONDS: Final = 1.0
# A pager of another agent that dies has this long to be replaced by its own before we take over.
FOREIGN_GRACE_SECONDS: Final = 5.0
# A VM that nobody wants served is looked at again only to keep its refusal from being ancient.
UNWANTED_SECONDS: Final = 3600.0
FORBIDDEN_SECONDS: Final = 5.0
START_SECONDS: Final = 30.0
POLL_FIRST_SECONDS: Final = 0.002
POLL_MOST_SECONDS: Final = 0.05
DETACH_POLL_SECONDS: Final = 0.2

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


class ManagedVm:
    """One VM. ``on_change`` is called when something happened that a report should not wait for."""

    def __init__(
        self, vmm: Vmm, vm_id: str, options: Callable[[], PagerOptions], on_change: Callable[[ManagedVm], None]
    ) -> None:
        self.vmm: Final = vmm
        self.vm_id = vm_id
        self.vm_class = ""
        self.phase = Phase.IDLE
        self.refusal = Refusal.NONE
        self.refusal_detail = ""
        self.inspection: Inspection | None = None
        self.grant: Grant | None = None
        self.grant_version = 0
        self.pager_restarts = 0
        self.last_takeover_seconds = 0.0
        self.discovered_at: Final = time.monotonic()
        self._wanted = False
        self._forbidden = False
        self._held = Held.NOT
        self._lease_until_ns = 0
        self._memory_bytes = 0
        self._start_failure = ""
        self._options: Final = options
        self._on_change: Final = on_change
        self._wake: Final = asyncio.Event()
        self._watch: Final = ProcessWatch(vmm.process, self._wake.set)
        self._link: Final = PagerLink(options().socket_path(vmm.process))
        self._vault: Final = VaultReader(vmm.process.pid)
        self._pager: PagerProcess | None = None
        self._pager_started_at = 0.0
        self._pager_died_at = 0.0
        self._restart: Final = RestartBackoff()
        self._not_before = 0.0
        self._stopping = False
        self._log = _log.bind(vm=vmm.name, vm_id=vm_id, pid=vmm.process.pid)
        self.task: Final = asyncio.create_task(self._run(), name=f"vm-{vmm.process}")

    # ---- what the rest of the agent asks and tells ----------------------------------------------------------

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
        return self._memory_bytes or self.vmm.memory_bytes

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
        lease_ns = max(0, self._lease_until_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME))
        interval_ns = self.status.scan_interval_ns if self.status else 0
        if scan_interval_ms:
            interval_ns = scan_interval_ms * 1_000_000
        command = Command(
            CommandKind.BUDGET,
            budget_bytes=self.grant.bytes if lease_ns else 0,
            rate_bytes=self.grant.rate_bytes_per_second,
            lease_ns=lease_ns,
            generation=self.grant_version,
            min_age_scans=min_age_scans(self.grant.min_age_seconds, interval_ns / 1e9),
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

    async def stop(self) -> None:
        """End the task. The pager lives on and serves; nothing of the VM changes."""
        self._stopping = True
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self._watch.close()
        if self._pager:
            self._pager.watch.close()
        self._link.close()
        self._vault.close()

    # ---- the task -------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while not self._watch.gone.is_set():
            self._wake.clear()
            try:
                delay = await self._step()
            except (OSError, ValueError) as error:
                self._log.error("a step failed; it is tried again", why=str(error), again_in_seconds=1)
                delay = 1.0
            if self._watch.gone.is_set():
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), delay)
        await self._bury()

    async def _step(self) -> float | None:
        """Take the step that the present state calls for; gives back when to look again unless woken before."""
        if self._pager is not None and self._pager.gone:
            self._pager_ended(self._pager)
        if self._pager is not None:
            if self.phase is Phase.FOREIGN or self.wanted:
                return None
            return await self._detach()
        left = self._not_before - time.monotonic()
        if left > 0:
            return left
        if self.inspection is None and not await self._inspect():
            return self._refuse_until()
        if not self.wanted and not self._vault.open():
            self._set_phase(Phase.IDLE)
            return None
        if await self._adopt():
            return 0.0
        if self._forbidden and not self._ours():
            self._set_phase(Phase.FOREIGN if self._vault.found else Phase.IDLE)
            return FORBIDDEN_SECONDS
        return await self._start()

    async def _inspect(self) -> bool:
        """Look before touching; False when the VM is refused already."""
        self.inspection = await asyncio.to_thread(inspect, self.vmm.process.pid)
        self._memory_bytes = self.inspection.memory_bytes
        if self.inspection.start_time_ticks not in (0, self.vmm.process.start_time_ticks):
            self._wake.set()  # the pid was reused: the watch on the process says so
        refusal = self.inspection.refusal
        if refusal in (Refusal.NONE, Refusal.ALREADY_SERVED):
            self._on_change(self)
            return True
        if refusal is Refusal.GONE:
            self.inspection, self._not_before = None, time.monotonic() + 1.0
        else:
            self._refused(refusal, self.inspection.detail)
        return False

    def _ours(self) -> bool:
        """Whether a pager of this run folder served it: a pager that was killed leaves its socket behind."""
        return self._link.path.exists()

    async def _adopt(self) -> bool:
        """Take over the supervision of a pager that lives already: an earlier agent's, or somebody else's."""
        if not self._vault.open() or self.status is None or not self.status.pager_alive:
            return False
        pager = adopt_pager(self.status.pager_pid, self._wake.set)
        if pager is None:
            return False
        self._pager, self._pager_started_at = pager, time.monotonic() - STABLE_SECONDS
        reply = await self._link.ping()
        if reply is not None and reply.pager_pid == pager.pid:
            self._refusal_over()
            self._set_phase(Phase.SERVED)
            self._log.info("adopted the living pager", pager_pid=pager.pid, evicted_bytes=self.evicted_bytes)
            await self._apply_remembered()
            return True
        self.refusal = Refusal.ALREADY_SERVED
        self.refusal_detail = (
            f"served by pager {pager.pid}, which does not answer on {self._link.path}: it belongs to an agent with "
            "another --run-dir; stop that agent and its pagers, or leave this VM to it"
        )
        self._set_phase(Phase.FOREIGN)
        self._log.warning("served by another agent's pager; observed only", why=self.refusal_detail)
        return True

    async def _start(self) -> float | None:
        """Start a pager and wait until it serves."""
        options = self._options()
        taking_over = self._vault.found
        if not taking_over:
            self._set_phase(Phase.STARTING)
        try:
            pager = start_pager(options, self.vmm.process, self._wake.set)
        except OSError as error:
            self._not_before = time.monotonic() + 1.0
            if str(error) != self._start_failure:  # said once, not every second
                self._start_failure = str(error)
                self._log.error(
                    "cannot start a pager; tried every second", program=str(options.program), why=str(error)
                )
            return 1.0
        self._start_failure = ""
        self._pager, self._pager_started_at = pager, time.monotonic()
        if not await self._serving(pager):
            return 0.0
        if not self._vault.open():
            self._log.warning("the pager answers, but its vault cannot be found", pager_pid=pager.pid)
        self._refusal_over()
        await self._apply_remembered(already=True)
        self._set_phase(Phase.SERVED)
        now = time.monotonic()
        if taking_over:
            self.pager_restarts += 1
            self.last_takeover_seconds = now - (self._pager_died_at or self._pager_started_at)
            self._log.warning(
                "the next pager serves", pager_pid=pager.pid, takeover_ms=round(self.last_takeover_seconds * 1e3, 1)
            )
        else:
            stop_us = round(self.status.attach_stop_ns / 1e3) if self.status else 0
            self._log.info(
                "attached",
                pager_pid=pager.pid,
                memory_bytes=self.memory_bytes,
                stopped_us=stop_us,
                took_ms=round((now - self._pager_started_at) * 1e3),
            )
        self._pager_died_at = 0.0
        return 0.0

    async def _serving(self, pager: PagerProcess) -> bool:
        """Wait until a started pager answers; False when it ended before."""
        deadline = time.monotonic() + START_SECONDS
        pause = POLL_FIRST_SECONDS
        while not pager.gone:
            reply = await self._link.ping()
            if reply is not None and reply.pager_pid == pager.pid and reply.state is not State.STARTING:
                return True
            if time.monotonic() > deadline:
                self._log.error("the pager does not answer; it is ended", pager_pid=pager.pid, waited_s=START_SECONDS)
                pager.watch.send_signal(signal.SIGKILL)
                deadline += START_SECONDS
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pager.watch.gone.wait(), pause)
            pause = min(pause * 1.5, POLL_MOST_SECONDS)
        return False

    async def _apply_remembered(self, already: bool = False) -> None:
        """The lease of a grant goes on across pagers and agents."""
        if already:
            self.phase = Phase.SERVED
        problem = await self.apply()
        if problem:
            self._log.warning("the pager did not take its budget", why=problem)

    async def _detach(self) -> float | None:
        """Ask for it once, then wait for the pager to end by itself."""
        if self.phase is not Phase.DETACHING:
            problem = await self.tell(Command(CommandKind.DETACH))
            if problem:
                self._log.warning("cannot detach yet; tried again", why=problem)
                return 1.0
            self._set_phase(Phase.DETACHING)
            self._log.info("detaching: everything back, then gone", evicted_bytes=self.evicted_bytes)
        self.read_status()
        return DETACH_POLL_SECONDS

    def _pager_ended(self, pager: PagerProcess) -> None:
        """Decide what follows from a pager's end."""
        ending = pager.ending()
        self._pager = None
        now = time.monotonic()
        self._pager_died_at = self._pager_died_at or now
        lived = now - self._pager_started_at
        was = self.phase
        self.read_status()
        if self.status is not None and self.status.state is State.DETACHED:
            self._detached(expected=was is Phase.DETACHING)
        elif was is Phase.FOREIGN:
            self._not_before = now + FOREIGN_GRACE_SECONDS
            if not self._forbidden:
                self._log.warning(
                    "another agent's pager ended; taking over unless it is replaced", in_seconds=FOREIGN_GRACE_SECONDS
                )
        elif ending.vm_gone:
            self._not_before = now + 1.0  # the VMM's own end is on its way to us
        elif ending.refusal is not Refusal.NONE:
            self._refused(ending.refusal, ending.detail)
        elif ending.in_good_order and not self._vault.found:
            self._detached(expected=was is Phase.DETACHING)
        else:
            self._died(ending, lived)

    def _died(self, ending: Ending, lived_seconds: float) -> None:
        if ending.in_good_order:
            self._not_before = 0.0
            self._log.info("the pager was released; the next one takes over")
            return
        # Where nothing is attached nobody waits for the next attempt.
        most = RESTART_MOST_SECONDS if self._vault.found else REFUSED_SECONDS
        wait = self._restart.wait_seconds(lived_seconds, most)
        self._not_before = time.monotonic() + wait if wait else 0.0
        self._log.warning(
            "the pager ended; starting the next one",
            why=ending.detail,
            lived_seconds=round(lived_seconds, 3),
            failures_in_a_row=self._restart.failures,
            wait_seconds=wait,
            evicted_bytes=self.evicted_bytes,
        )

    def _detached(self, expected: bool) -> None:
        self._vault.close()
        self._pager_died_at = 0.0
        self._set_phase(Phase.IDLE)
        # Somebody else told the pager to: do not attach again in the same breath.
        self._not_before = 0.0 if expected else time.monotonic() + 1.0
        self.inspection = self.inspection if expected else None
        self._log.info("detached", asked_for_by="agent" if expected else "somebody on the pager's socket")

    def _refused(self, refusal: Refusal, detail: str) -> None:
        changed = (refusal, detail) != (self.refusal, self.refusal_detail) or self.phase is not Phase.REFUSED
        self.refusal, self.refusal_detail = refusal, detail
        self.inspection = None  # look again before the next attempt
        self._set_phase(Phase.REFUSED)
        pause = REFUSED_AWAY_SECONDS if self._vault.found else REFUSED_SECONDS if self.wanted else UNWANTED_SECONDS
        self._not_before = time.monotonic() + pause
        if changed:
            self._log.warning("not served", refusal=refusal.word, why=detail, attached_before=self._vault.found)

    def _refuse_until(self) -> float:
        return max(0.0, self._not_before - time.monotonic())

    def _refusal_over(self) -> None:
        self.refusal, self.refusal_detail = Refusal.NONE, ""

    def _set_phase(self, phase: Phase) -> None:
        if phase is not self.phase:
            self.phase = phase
            self._on_change(self)

    async def _bury(self) -> None:
        """The VMM has ended: its pager ends by itself, and is helped if it does not."""
        self._set_phase(Phase.GONE)
        self._vault.close()
        pager = self._pager
        if pager is not None and not pager.gone:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(pager.watch.gone.wait(), 5.0)
            if not pager.gone and not pager.adopted:
                self._log.warning("the pager outlived its VM; it is ended", pager_pid=pager.pid)
                pager.watch.send_signal(signal.SIGKILL)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(pager.watch.gone.wait(), 1.0)
        if pager is not None and pager.gone:
            pager.ending()
        self._link.close()
        for path in (self._options().socket_path(self.vmm.process), self._options().log_path(self.vmm.process)):
            if path is not None:
                path.unlink(missing_ok=True)
        self._log.info("the VM has ended", served_seconds=round(time.monotonic() - self.discovered_at, 1))
