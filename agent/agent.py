# SPDX-License-Identifier: Apache-2.0
"""The agent: discovers VMs, keeps a pager at each, reports, applies budgets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from importlib.metadata import version
from typing import Any, Final

import structlog

from frostline.agent.admin import AdminError, AdminRequest, AdminServer
from frostline.agent.authority import Authority
from frostline.agent.commands import Commands
from frostline.agent.daemon import Daemon
from frostline.agent.estimates import Estimates
from frostline.agent.failsafe import Failsafe
from frostline.agent.host import Host
from frostline.agent.limits import LimitsError, load_limits
from frostline.agent.metrics import AgentCounts, AgentMetrics
from frostline.agent.pager import PagerOptions
from frostline.agent.procfs import boot_id, read_host_memory
from frostline.agent.report import PromotionRates, ReportBuilder, identity, reportable
from frostline.agent.rundir import RunDir
from frostline.agent.session import PROTOCOL_VERSION, SessionClient, SessionStatus
from frostline.agent.settings import AgentSettings
from frostline.agent.standalone import DEFAULT_DECISION_SECONDS, Standalone
from frostline.agent.state import StateFile
from frostline.agent.status import status_document
from frostline.agent.traces import Traces
from frostline.agent.trackers import capabilities, trackers_text
from frostline.agent.vm import Held, Phase, Vm
from frostline.native import Command, CommandKind, Tracker, tidy_host
from frostline.native.binary import pager_path
from frostline.v1 import session_pb2
from frostline.wire.telemetry import Telemetry

TIERS: Final = ("tier.zero", "tier.same", "tier.ram")
TIDY_SECONDS: Final = 60.0

_log: Final = structlog.stdlib.get_logger("frostline.agent")


class Agent(Daemon):
    """One per host. With ``settings.policy`` it works alone, else with the controller."""

    def __init__(self, settings: AgentSettings, telemetry: Telemetry, run_dir: RunDir) -> None:
        """Raises LimitsError, PolicyError, StateError or FileNotFoundError for what it cannot start with."""
        super().__init__(settings.discovery_interval)
        self._settings: Final = settings
        self._telemetry: Final = telemetry
        self._run_dir: Final = run_dir
        self._program: Final = settings.pager or pager_path()
        limits = load_limits(settings.limits, evict_by_default=settings.policy is not None)
        self._state: Final = StateFile(settings.state_path)
        self._instance: Final = uuid7()
        self._boot_id: Final = boot_id()
        self._counts: Final = AgentCounts()
        self._traces: Final = Traces(telemetry)
        self._limits = limits
        self._host: Final = Host(settings.node_id, self._pager_options, self._changed)
        self._authority: Final = Authority(
            self._host, limits, self._state, self._traces, attach_grace_seconds=settings.attach_grace
        )
        self._commands: Final = Commands(self._host)
        self._rates: Final = PromotionRates()
        self._reports = ReportBuilder(self._rates)
        self._estimates: Final = Estimates()
        self._failsafe: Final = Failsafe(settings.drain_after)
        self._admin: Final = AdminServer(settings.admin_path, self._answer)
        self._tasks: list[asyncio.Task[None]] = []
        self._tidy_at = 0.0
        self._tidying: asyncio.Task[None] | None = None
        self._session: SessionClient | None = None
        self._standalone: Standalone | None = None
        if settings.policy is not None:
            self._standalone = Standalone(
                settings.policy,
                lambda: self._host,
                self._authority,
                self._traces,
                settings.report_interval or DEFAULT_DECISION_SECONDS,
            )
        else:
            self._session = SessionClient(
                settings.controller,
                self,
                report_seconds=settings.report_interval,
                insecure_off_loopback=settings.insecure_off_loopback,
            )
        AgentMetrics(
            telemetry.meter("frostline.agent"),
            self._host,
            self._counts,
            lambda: self._session.status if self._session else None,
            lambda: self._authority.highest_epoch,
        )

    # ---- daemon ---------------------------------------------------------------------------------------------

    async def _begin(self) -> None:
        if self._state.warning:
            _log.warning("the state file was damaged", why=self._state.warning)
        await self._admin.start()
        _log.info(
            "the agent runs",
            node_id=self._settings.node_id,
            mode="standalone" if self._standalone else "run",
            controller=self._settings.controller or None,
            policy=str(self._settings.policy) if self._settings.policy else None,
            limits=self._limits.source,
            allow_evict=self._limits.allow_evict,
            run_dir=str(self._run_dir.path),
            metrics=self._telemetry.metrics_address,
            pager=str(self._program),
            trackers=trackers_text(self._trackers()),
            highest_epoch=self._authority.highest_epoch,
        )
        await self._discover()
        work = self._session or self._standalone
        if work is not None:
            self._tasks.append(asyncio.create_task(work.run(), name="authority"))

    async def _cycle(self) -> None:
        started = time.monotonic()
        self._traces.measure_clocks()
        await self._discover()
        for vm in self._host:
            records, lost = vm.read()
            self._counts.records_lost += lost
            # Another agent's pager counts its budget sets as ours does: its records would join our traces.
            if vm.phase not in (Phase.IDLE, Phase.REFUSED, Phase.FOREIGN):
                self._traces.note(vm, records)
        await self._estimates.refresh(self._host)
        self._authority.settle()
        await self._authority.watch_pool()
        if self._session is not None:
            await self._failsafe.watch(self._session.disconnected_seconds, self._host, read_host_memory())
        if started >= self._tidy_at:
            self._tidy_at = started + TIDY_SECONDS
            self._host.tidy()
            self._tidy()
        self._counts.cycles += 1
        self._counts.cycle_seconds = time.monotonic() - started
        for task in self._tasks:
            if task.done():
                task.result()
                raise RuntimeError(f"the task {task.get_name()} ended by itself")

    def _tidy(self) -> None:
        """Beside the cycle: it may have to wait for a pager that sets DAMON up, some 20 s at most."""
        if self._tidying is not None:
            if not self._tidying.done():
                return
            self._tidying.result()
        self._tidying = asyncio.create_task(asyncio.to_thread(tidy_host), name="tidy")

    async def _discover(self) -> None:
        new, gone = await self._host.discover()
        self._authority.settle()
        self._rates.forget(vm.vmm.process for vm in gone)
        self._counts.pager_restarts += sum(vm.pager_restarts for vm in gone)
        if new or gone:
            self._news()

    async def _reload(self) -> None:
        try:
            limits = load_limits(self._settings.limits, evict_by_default=self._standalone is not None)
        except LimitsError as error:
            _log.error("the limits file is rejected; the last good one stays in force", why=str(error))
        else:
            _log.info("limits read again", limits=limits.source, allow_evict=limits.allow_evict)
            interval_changed = limits.document.scan_interval != self._limits.document.scan_interval
            trackers_before = self._trackers()
            self._limits = limits
            if self._trackers() != trackers_before:
                _log.info(
                    "other trackers for pagers that start from now on; `frostline-agent release` starts them",
                    trackers=trackers_text(self._trackers()),
                    before=trackers_text(trackers_before),
                )
            await self._authority.reapply(limits)
            if interval_changed and limits.document.scan_interval:
                interval_ms = round(limits.document.scan_interval * 1000)
                await asyncio.gather(*(vm.apply(interval_ms) for vm in self._host))
        if self._standalone is not None:
            self._standalone.decide_soon()

    async def _end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        detach = self._settings.detach_on_exit and self.asked_to_stop
        if detach:
            await self._detach_all()
        await self._admin.stop()
        await self._host.stop()
        _log.info("the agent leaves", pagers="detached" if detach else "stay and serve")

    async def _detach_all(self) -> None:
        for vm in self._host:
            await vm.hold(Held.DETACHED)
        deadline = time.monotonic() + self._settings.detach_timeout
        while left := [vm for vm in self._host if vm.status is not None and vm.phase is not Phase.FOREIGN]:
            if time.monotonic() > deadline:
                _log.error("not all VMs could be detached in time; their pagers stay", vms=[vm.vmm.name for vm in left])
                return
            await asyncio.sleep(0.1)

    def _pager_options(self) -> PagerOptions:
        document = self._limits.document
        return PagerOptions(
            program=self._program,
            socket_dir=self._run_dir.sockets,
            log_dir=self._run_dir.logs if self._settings.pager_log == "file" else None,
            fault_threads=document.fault_threads,
            scan_interval_ms=round(document.scan_interval * 1000) if document.scan_interval else None,
            pool_max_bytes=self._limits.vm_pool_bytes(),
            stall_target_permille=document.stall_target,
            longest_io_ms=None if document.longest_io is None else round(document.longest_io * 1000),
            log_level=self._settings.log_level,
            trackers=self._trackers(),
        )

    def _trackers(self) -> tuple[Tracker, ...]:
        """What is asked for in the settings goes before the limits file."""
        asked = self._settings.trackers
        return asked if asked is not None else self._limits.document.trackers or ()

    def _changed(self, _vm: Vm) -> None:
        self._news()

    def _news(self) -> None:
        if self._session is not None:
            self._session.report_soon()
        if self._standalone is not None:
            self._standalone.decide_soon()

    # ---- session --------------------------------------------------------------------------------------------

    def hello(self) -> session_pb2.Hello:
        memory = read_host_memory()
        return session_pb2.Hello(
            node_id=self._settings.node_id,
            boot_id=self._boot_id,
            agent_instance=self._instance,
            protocol_version=PROTOCOL_VERSION,
            capabilities=(*capabilities(), *TIERS),
            vms=[identity(vm) for vm in self._host if reportable(vm)],
            applied_version=self._authority.applied_version,
            highest_epoch=self._authority.highest_epoch,
            host_memory_bytes=memory.total_bytes,
            host_available_bytes=memory.available_bytes,
            agent_version=version("frostline"),
        )

    def new_stream(self, report_seconds: float) -> None:
        self._rates.min_period_seconds = report_seconds / 2
        self._reports = ReportBuilder(self._rates)
        self._authority.forget_stream()

    @contextlib.contextmanager
    def report(self, *, full: bool) -> Iterator[session_pb2.Report]:
        for vm in self._host:
            vm.read_status()
        with self._traces.reporting() as traceparent:
            yield self._reports.build(
                self._host, read_host_memory(), full=full, traceparent=traceparent, now_unix_ns=time.time_ns()
            )

    def heartbeat(self) -> session_pb2.Heartbeat:
        return session_pb2.Heartbeat(
            last_sequence=self._reports.sequence, applied_version=self._authority.applied_version
        )

    async def welcome(self, welcome: session_pb2.Welcome) -> str:
        return await self._authority.welcome(welcome.epoch)

    async def take_budgets(self, budget_set: session_pb2.BudgetSet) -> session_pb2.BudgetResult:
        result = await self._authority.take(budget_set)
        self._counts.sets_refused += not result.applied
        return result

    async def do_command(
        self, command: session_pb2.Command, answer: Callable[[session_pb2.CommandResult], None]
    ) -> None:
        await self._commands.do(command, answer)
        self._news()

    # ---- admin socket ---------------------------------------------------------------------------------------

    async def _answer(self, request: AdminRequest) -> dict[str, Any]:
        if request.method == "status":
            status: SessionStatus | None = self._session.status if self._session else None
            return status_document(self._settings, self._trackers(), self._host, self._authority, status)
        chosen = self._chosen(request)
        actions: dict[str, Callable[[Vm], Awaitable[str]]] = {
            "release": lambda vm: vm.tell(Command(CommandKind.RELEASE)),
            "drain": lambda vm: vm.hold(Held.DRAINED),
            "detach": lambda vm: vm.hold(Held.DETACHED),
            "resume": lambda vm: vm.resume(),
        }
        problems = await asyncio.gather(*(actions[request.method](vm) for vm in chosen))
        _log.info("asked on the admin socket", method=request.method, vms=[vm.vmm.name for vm in chosen])
        return {
            "vms": [
                {"vm_id": vm.vm_id, "name": vm.vmm.name, "problem": problem}
                for vm, problem in zip(chosen, problems, strict=True)
            ]
        }

    def _chosen(self, request: AdminRequest) -> list[Vm]:
        if not request.vm:
            if request.method == "release":
                return [vm for vm in self._host if vm.phase is Phase.SERVED]
            raise AdminError("invalid", f"{request.method} needs a VM")
        found: list[Vm] = [*self._host.find(request.vm)]
        if not found:
            raise AdminError("not_found", f"there is no VM {request.vm!r} on this host")
        if len(found) > 1:
            ids = ", ".join(vm.vm_id for vm in found)
            raise AdminError("ambiguous", f"{len(found)} VMs are called {request.vm!r}; name one by its id: {ids}")
        return found


def uuid7() -> bytes:
    """A UUIDv7 (RFC 9562): 48 bits of Unix milliseconds, version, variant, the rest random."""
    milliseconds = time.time_ns() // 1_000_000
    raw = bytearray(milliseconds.to_bytes(6, "big") + os.urandom(10))
    raw[6] = 0x70 | (raw[6] & 0x0F)
    raw[8] = 0x80 | (raw[8] & 0x3F)
    return bytes(raw)
