# SPDX-License-Identifier: Apache-2.0
"""Keeps one VM served: attach, keep a pager alive, detach.

Each VM has a task that is woken by what happens (its VMM or its pager ended, somebody changed their mind) and then
takes the one step that the present state calls for. A pager's death wakes it through the pidfd, so the next pager
starts within milliseconds, whatever the rest of the agent is doing.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from typing import Final

from frostline.agent.backoff import RESTART_MOST_SECONDS, STABLE_SECONDS, RestartBackoff
from frostline.agent.discovery import Vmm
from frostline.agent.pager import Ending, PagerLink, PagerOptions, PagerProcess, adopt_pager, start_pager
from frostline.agent.processes import ProcessWatch
from frostline.agent.vm import Phase, Vm
from frostline.native import Command, CommandKind, Inspection, Refusal, State, inspect

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


class ManagedVm(Vm):
    """A VM with the task that keeps it served; ``options`` are asked for anew at each start of a pager."""

    def __init__(
        self, vmm: Vmm, vm_id: str, options: Callable[[], PagerOptions], on_change: Callable[[Vm], None]
    ) -> None:
        super().__init__(vmm, vm_id, PagerLink(options().socket_path(vmm.process)), on_change)
        self._options: Final = options
        self._inspection: Inspection | None = None
        self._watch: Final = ProcessWatch(vmm.process, self._wake.set)
        self._pager_started_at = 0.0
        self._pager_died_at = 0.0
        self._restart: Final = RestartBackoff()
        self._start_failure = ""
        self._detach_failure = ""
        self.task: Final = asyncio.create_task(self._run(), name=f"vm-{vmm.process}")

    async def stop(self) -> None:
        """End the task. The pager lives on and serves; nothing of the VM changes."""
        self.task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self.task
        self._watch.close()
        if self._pager:
            self._pager.watch.close()
        self._link.close()
        self._vault.close()

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
            if self.phase is Phase.FOREIGN:
                return await self._ask_again(self._pager)
            return None if self.wanted else await self._detach()
        left = self._not_before - time.monotonic()
        if left > 0:
            return left
        if self._inspection is None and not await self._inspect():
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
        self._inspection = await asyncio.to_thread(inspect, self.vmm.process.pid)
        self._inspected_bytes = self._inspection.memory_bytes
        if self._inspection.start_time_ticks not in (0, self.vmm.process.start_time_ticks):
            self._wake.set()  # the pid was reused: the watch on the process says so
        refusal = self._inspection.refusal
        if refusal in (Refusal.NONE, Refusal.ALREADY_SERVED):
            self._on_change(self)
            return True
        if refusal is Refusal.GONE:
            self._inspection, self._not_before = None, time.monotonic() + 1.0
        else:
            self._refused(refusal, self._inspection.detail)
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
        if await self._answers(pager):
            await self._adopted(pager)
            return True
        self.refusal = Refusal.ALREADY_SERVED
        self.refusal_detail = (
            f"served by pager {pager.pid}, which does not answer on {self._link.path}: it belongs to an agent with "
            "another --run-dir; stop that agent and its pagers, or leave this VM to it"
        )
        self._set_phase(Phase.FOREIGN)
        self._log.warning("served by another agent's pager; observed only", why=self.refusal_detail)
        return True

    async def _answers(self, pager: PagerProcess) -> bool:
        """Whether this pager is the one behind our socket."""
        reply = await self._link.ping()
        return reply is not None and reply.pager_pid == pager.pid

    async def _adopted(self, pager: PagerProcess) -> None:
        self._refusal_over()
        self._set_phase(Phase.SERVED)
        self._log.info("adopted the living pager", pager_pid=pager.pid, evicted_bytes=self.evicted_bytes)
        await self._apply_remembered()

    async def _ask_again(self, pager: PagerProcess) -> float | None:
        """One that looked like another agent's may only have been too busy to answer."""
        if not self._ours():
            return None
        if await self._answers(pager):
            await self._adopted(pager)
            return 0.0
        return FOREIGN_GRACE_SECONDS

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
                if problem != self._detach_failure:
                    self._detach_failure = problem
                    self._log.warning("cannot detach yet; tried every second", why=problem)
                return 1.0
            self._detach_failure = ""
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
        self._inspection = self._inspection if expected else None
        self._log.info("detached", asked_for_by="agent" if expected else "somebody on the pager's socket")

    def _refused(self, refusal: Refusal, detail: str) -> None:
        changed = (refusal, detail) != (self.refusal, self.refusal_detail) or self.phase is not Phase.REFUSED
        self.refusal, self.refusal_detail = refusal, detail
        self._inspection = None  # look again before the next attempt
        self._set_phase(Phase.REFUSED)
        pause = REFUSED_AWAY_SECONDS if self._vault.found else REFUSED_SECONDS if self.wanted else UNWANTED_SECONDS
        self._not_before = time.monotonic() + pause
        if changed:
            self._log.warning("not served", refusal=refusal.word, why=detail, attached_before=self._vault.found)

    def _refuse_until(self) -> float:
        return max(0.0, self._not_before - time.monotonic())

    def _refusal_over(self) -> None:
        self.refusal, self.refusal_detail = Refusal.NONE, ""

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
        self._link.path.unlink(missing_ok=True)
        self._log.info("the VM has ended", served_seconds=round(time.monotonic() - self.discovered_at, 1))
