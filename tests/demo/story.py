# SPDX-License-Identifier: Apache-2.0
"""The demo's story, chapter by chapter, on real processes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, Final

from frostline.controller.state.scripts import DECISIONS
from frostline.native import State, inspect
from frostline.wire.units import format_size
from tests.demo.report import Report
from tests.demo.sampler import Sample, Sampler
from tests.demo.screen import Screen
from tests.system.daemons import AgentDaemon, RedisDaemon
from tests.system.guest import Guest, GuestConfig, Workload
from tests.system.otlp_receiver import OtlpReceiver, Trace
from tests.system.world import MIB, World, WorldError, kill_pid

# An eighth is left to the guest's kernel, which has its own cold pages.
BUSY: Final = GuestConfig(
    name="busy", memory_mib=1024, workload=Workload(mib=800, hot_mib=16, rate=40, random_percent=3, seed=20)
)
QUIET: Final = GuestConfig(
    name="payments", memory_mib=256, vcpus=1, workload=Workload(mib=128, hot_mib=8, rate=20, seed=21)
)
# Production's target is 1 % of the time. Here two emulated CPUs share a machine with everything else, and each wait
# for a page is hundreds of times longer than on KVM: the brake would slow a two-minute story down to nothing.
STALL_TARGET: Final = "20%"
RULE: Final[dict[str, Any]] = {"min_idle_age": "4s", "floor": "10%", "cap": "90%", "rate": "48MiB/s"}
TRACE: Final = ("agent.scan", "agent.report", "controller.decide", "budget.push", "budget.apply", "swap.evict")
WATCH_SECONDS: Final = 12.0
WATCH_RATE: Final = 400


class Story:
    """Tells itself once; ``report`` holds what was found so far, also when it ends early."""

    def __init__(self, screen: Screen, logs: Path) -> None:
        self.report: Final = Report(guest_memory_bytes=BUSY.memory_mib * MIB)
        self._screen: Final = screen
        self._logs: Final = logs

    def tell(self) -> None:
        """Raises WorldError, GuestError or TimeoutError, with what failed and the ends of the logs."""
        with OtlpReceiver() as receiver, World(keep_logs_in=self._logs, otlp=receiver.endpoint) as world:
            self._tell(world, receiver)
        self.report.seconds = self._screen.seconds

    def _tell(self, world: World, receiver: OtlpReceiver) -> None:
        redis = self._begin(world)
        busy, quiet = world.start_guest(BUSY), world.start_guest(QUIET)
        self.report.accelerator = busy.accelerator
        sampler = Sampler(world, busy, quiet)
        self._screen.source = lambda: sampler.latest
        try:
            self._fill(sampler, busy, quiet)
            agent = self._attach(world, sampler)
            self._plan(sampler)
            self._enforce(world, sampler, agent, busy)
            self._watch(sampler, busy)
            self._drain_and_detach(world, sampler, agent, busy)
            self._verify(sampler, busy, quiet)
            self._account(redis, receiver, sampler)
        finally:
            sampler.stop()
            self._screen.source = None

    # --- chapters ---

    def _begin(self, world: World) -> RedisDaemon:
        self._screen.chapter("Redis and a controller start; the first policy only plans, and excludes one VM.")
        redis = world.start_redis()
        world.start_controller()
        self._put_policy(world, "plan", "look, but take nothing")
        return redis

    def _fill(self, sampler: Sampler, busy: Guest, quiet: Guest) -> None:
        fills = f"{BUSY.name} fills {BUSY.fill_mib} of {BUSY.memory_mib} MiB, {QUIET.name} {QUIET.fill_mib} of "
        self._screen.chapter(
            "Two Linux guests boot in an unmodified QEMU.",
            f"{fills}{QUIET.memory_mib} MiB, with content that each can check byte by byte.",
        )
        busy.wait_filled(150)
        quiet.wait_filled(60)
        sample = sampler.pause(1.0)
        self.report.memfd_bytes_before = sample.busy.memfd_bytes
        self._screen.say(f"{BUSY.name} holds {format_size(sample.busy.memfd_bytes)} of host RAM.")

    def _attach(self, world: World, sampler: Sampler) -> AgentDaemon:
        self._screen.chapter(
            "The agent starts, finds both, and attaches a pager to the one that policy lets it.",
            f"Its limits file allows eviction; the local brake's stall target is {STALL_TARGET} here (1 % is normal): "
            f"guests under {self.report.accelerator} wait far longer for a page.",
        )
        agent = world.start_agent([BUSY, QUIET], limits={"stall_target": STALL_TARGET})
        sample = sampler.until(
            "a pager at the guest", lambda s: s.busy.vault is not None and s.busy.vault.scans > 0, 30
        )
        assert sample.busy.vault is not None
        self.report.attach_stop_us = round(sample.busy.vault.attach_stop_ns / 1000, 1)
        self._screen.say(f"Attached: QEMU's main thread stood still for {self.report.attach_stop_us:.0f} us.")
        return agent

    def _plan(self, sampler: Sampler) -> None:
        self._screen.chapter("The pager watches which pages are touched; the controller says what could go.")
        wanted = BUSY.fill_mib * MIB * 3 // 4
        sample = sampler.until("a plan", lambda s: s.busy.planned_bytes >= wanted, 45)
        assert sample.busy.vm is not None
        self._screen.say(sample.busy.vm.decision.sentence)
        self._screen.histogram(sample.busy)
        if sample.busy.evicted_bytes:
            raise WorldError(f"{sample.busy.evicted_bytes} bytes were evicted in plan mode")

    def _enforce(self, world: World, sampler: Sampler, agent: AgentDaemon, busy: Guest) -> None:
        self._screen.chapter("frostline policy put: the same policy, now to enforce. Cold pages leave host RAM.")
        planned = sampler.latest.busy.planned_bytes
        version = self._put_policy(world, "enforce", "take what is cold")
        self._screen.say(f"Policy version {version} is in force: at most {RULE['rate']}, pages idle for 4 s.")
        self._kill_pager(sampler, agent, busy, planned)
        steady = _Steady()
        sample = sampler.until(
            "most of the plan away",
            lambda s: s.busy.evicted_bytes >= planned * 0.85 and steady.seen(s),
            90,
        )
        self._screen.say(
            f"{format_size(sample.busy.evicted_bytes)} are away, in {format_size(sample.busy.pool_bytes)}."
        )

    def _kill_pager(self, sampler: Sampler, agent: AgentDaemon, busy: Guest, planned: int) -> None:
        before = sampler.until("pages on their way out", lambda s: s.busy.evicted_bytes >= planned * 0.3, 60)
        assert before.busy.vault is not None
        pager = agent.pagers().get(busy.pid)
        if pager is None or not kill_pid(pager):
            raise WorldError(f"there is no pager to kill at {BUSY.name}; {agent.words()}")
        killed_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        takeovers = before.busy.vault.takeovers
        self.report.killed_at_bytes = before.busy.evicted_bytes
        self._screen.say(f"kill -9 {pager}: the pager dies with {format_size(before.busy.evicted_bytes)} away.")
        sample = sampler.until(
            "the next pager",
            lambda s: (
                s.busy.vault is not None
                and s.busy.vault.takeovers > takeovers
                and s.busy.vault.pager_alive
                and s.busy.vault.state is not State.STARTING
            ),
            30,
        )
        vault = sample.busy.vault
        assert vault is not None
        self.report.takeover_ms = round((vault.pager_started_ns + vault.takeover_ns - killed_ns) / 1e6, 1)
        self._screen.say(
            f"Pager {vault.pager_pid} serves {self.report.takeover_ms:.0f} ms after the kill; "
            f"{vault.recovered_pages} pages in flight were put right."
        )

    def _watch(self, sampler: Sampler, busy: Guest) -> None:
        self._screen.chapter(
            f"The guest goes back to cold pages, {WATCH_RATE} at random each second, and checks every byte.",
        )
        busy.command(f"rate {WATCH_RATE}")
        sample = sampler.pause(WATCH_SECONDS)
        busy.command(f"rate {BUSY.workload.rate}")
        vault = sample.busy.vault
        if vault is None:
            raise WorldError(f"{BUSY.name} is not attached any more")
        report = self.report
        report.memfd_bytes_after, report.pool_bytes = sample.busy.memfd_bytes, vault.pool_bytes
        report.metadata_bytes = vault.metadata_bytes
        report.evicted_pages = vault.evicted_pages
        report.evicted_zero_pages, report.evicted_same_pages = vault.evicted_zero_pages, vault.evicted_same_pages
        report.evicted_ram_pages = vault.evicted_ram_pages
        self._note_faults(sample)
        self._screen.histogram(sample.busy)

    def _drain_and_detach(self, world: World, sampler: Sampler, agent: AgentDaemon, busy: Guest) -> None:
        self._screen.chapter(f"frostline drain {BUSY.name} --wait: everything comes back.")
        drained = world.cli("drain", BUSY.name, "--wait")
        if not drained["done"]:
            raise WorldError(f"the drain is not done: {drained}")
        self._note_faults(sampler.pause(0.5))
        self._screen.chapter(f"frostline-agent detach {BUSY.name}: nothing of us stays in QEMU.")
        world.agent_cli(agent, "detach", BUSY.name)
        sampler.until("the detach", lambda s: s.busy.vault is None, 60)
        found = inspect(busy.pid)
        if found.has_vault or found.served_by_pid:
            raise WorldError(f"after detaching, something of ours is still in QEMU: {found}")

    def _verify(self, sampler: Sampler, busy: Guest, quiet: Guest) -> None:
        self._screen.chapter("Both guests compare every byte they ever wrote, and run on.")
        busy.verify(90)
        self.report.excluded_errors = quiet.verify(60)
        rounds = busy.wait_rounds(3, 30).round
        status = busy.status()
        self.report.guest_rounds, self.report.guest_errors = rounds, status.errors
        self.report.guest_checked_pages = status.checked_pages
        self.report.outlived_detach = busy.alive() and quiet.alive()
        self.report.excluded_bytes = sampler.latest.quiet.memfd_bytes
        self.report.excluded_lost_nothing = sampler.losses.none and quiet.status().errors == 0

    def _account(self, redis: RedisDaemon, receiver: OtlpReceiver, sampler: Sampler) -> None:
        with redis.client() as client:
            self.report.decisions = int(client.xlen(DECISIONS))
        trace = receiver.wait_for_trace(*TRACE, limit_seconds=15)
        assert isinstance(trace, Trace)
        self.report.trace_id, self.report.trace_spans = trace.trace_id, len(trace)

    # --- small things ---

    def _put_policy(self, world: World, mode: str, comment: str) -> int:
        document = {
            "version": 1,
            "default_class": "demo",
            "classes": {"demo": {"mode": mode, **RULE}},
            "vms": {QUIET.name: {"exclude": True}},
        }
        return world.put_policy(document, comment)

    def _note_faults(self, sample: Sample) -> None:
        vault = sample.busy.vault
        if vault is not None:
            self.report.faults = vault.faults
            self.report.fault_p50_us = round(vault.fault_percentile_ns(500) / 1000, 1)
            self.report.fault_p99_us = round(vault.fault_percentile_ns(990) / 1000, 1)


class _Steady:
    """Whether eviction has come to rest: no new high for two seconds."""

    def __init__(self) -> None:
        self._most = 0
        self._since = 0.0

    def seen(self, sample: Sample) -> bool:
        if sample.busy.evicted_bytes > self._most + 4 * MIB:
            self._most, self._since = sample.busy.evicted_bytes, sample.at
        return sample.at - self._since >= 2.0
