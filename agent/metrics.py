# SPDX-License-Identifier: Apache-2.0
"""The agent's metrics: observed when somebody scrapes, from the statuses that the last cycle read.

docs/metrics.md has them as a table; a test holds the two together. No gauge is ever negative.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from opentelemetry.metrics import CallbackOptions, Meter, Observation

from frostline.agent.host import Host
from frostline.agent.session import SessionStatus
from frostline.agent.vm import Phase, Vm
from frostline.native import LATENCY_BUCKET_EDGES_NS, State, Status


@dataclass(frozen=True, slots=True)
class VmMetric:
    """One number of every VM that has a vault; ``counter``: cumulative over the vault's life."""

    name: str
    unit: str
    description: str
    value: Callable[[Status], float]
    counter: bool = False
    attributes: Callable[[Status], dict[str, str]] | None = None  # beside who it is


VM_METRICS: Final[tuple[VmMetric, ...]] = (
    VmMetric(
        "frostline.vm.tracker",
        "1",
        "Always 1; how accesses are seen, and how pages are frozen while they are copied out",
        lambda s: 1,
        attributes=lambda s: {"tracker": s.tracker.word, "freeze": s.freeze.word},
    ),
    VmMetric(
        "frostline.vm.tracker.grain",
        "{page}",
        "Pages of which one speaks for all; 1: ages are exact to a page, more: they are an estimate",
        lambda s: s.tracker_grain,
    ),
    VmMetric("frostline.vm.memory", "By", "Guest memory of the VM", lambda s: s.memory_bytes),
    VmMetric(
        "frostline.vm.resident", "By", "Guest memory in host RAM, as of the last scan", lambda s: s.resident_bytes
    ),
    VmMetric(
        "frostline.vm.swapped",
        "By",
        "Guest memory that the host kernel itself has swapped out, as of the last scan",
        lambda s: s.swapped_bytes,
    ),
    VmMetric("frostline.vm.evicted", "By", "Guest memory that is away", lambda s: s.evicted_bytes),
    VmMetric("frostline.vm.stored", "By", "Compressed payload in the pool", lambda s: s.stored_bytes),
    VmMetric("frostline.vm.pool", "By", "Host RAM that the compressed pool holds", lambda s: s.pool_bytes),
    VmMetric("frostline.vm.metadata", "By", "Host RAM of page table, ages and statistics", lambda s: s.metadata_bytes),
    VmMetric(
        "frostline.vm.saved",
        "By",
        "Evicted memory less pool and metadata; 0 while they cost more",
        lambda s: max(0, s.evicted_bytes - s.pool_bytes - s.metadata_bytes),
    ),
    VmMetric("frostline.vm.working_set", "By", "Touched in the last 120 s", lambda s: s.working_set_bytes),
    VmMetric(
        "frostline.vm.budget",
        "By",
        "What may be away; 0 without a valid lease",
        lambda s: s.budget_bytes if s.lease_remaining_seconds() > 0 else 0,
    ),
    VmMetric("frostline.vm.lease", "s", "Time left of the budget's lease", lambda s: s.lease_remaining_seconds()),
    VmMetric(
        "frostline.vm.brake", "1", "Share of the budget that the local brake leaves", lambda s: s.brake_permille / 1e3
    ),
    VmMetric("frostline.vm.pager.up", "1", "1 while a pager serves the VM", lambda s: int(s.pager_alive)),
    VmMetric("frostline.vm.pager.state", "1", "Number of the pager's state (enum fl_state)", lambda s: int(s.state)),
    VmMetric("frostline.vm.corrupt", "1", "1 once a checksum has failed", lambda s: int(s.state is State.CORRUPT)),
    VmMetric(
        "frostline.vm.takeover.duration", "s", "How long the last pager took to serve", lambda s: s.takeover_ns / 1e9
    ),
    VmMetric("frostline.vm.attach.stop", "s", "How long attaching stopped the VMM", lambda s: s.attach_stop_ns / 1e9),
    VmMetric("frostline.vm.scan.stop.max", "s", "Longest single chunk of a scan", lambda s: s.scan_stop_max_ns / 1e9),
    VmMetric(
        "frostline.vm.sync.max",
        "s",
        "Longest time in sync mode, in which touches of cold memory are answered by the pager (where rwp freezes)",
        lambda s: s.sync_max_ns / 1e9,
    ),
    VmMetric("frostline.vm.scan.interval", "s", "Time between scans", lambda s: s.scan_interval_ns / 1e9),
    VmMetric("frostline.vm.scan.duration", "s", "How long the last scan took", lambda s: s.last_scan_took_ns / 1e9),
    VmMetric(
        "frostline.vm.fault.p50",
        "s",
        "Median time of a fault, all faults so far",
        lambda s: s.fault_percentile_ns(500) / 1e9,
    ),
    VmMetric(
        "frostline.vm.fault.p99", "s", "99th percentile of a fault's time", lambda s: s.fault_percentile_ns(990) / 1e9
    ),
    VmMetric("frostline.vm.scans", "{scan}", "Scans done", lambda s: s.scans, counter=True),
    VmMetric("frostline.vm.scan.failures", "{scan}", "Void scans", lambda s: s.scan_failures, counter=True),
    VmMetric(
        "frostline.vm.scan.arm",
        "s",
        "Time spent making accesses visible; by rwp and zap also looking for them",
        lambda s: s.arm_ns / 1e9,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.scan.harvest",
        "s",
        "Time spent reading accesses; by rwp and zap without looking for them",
        lambda s: s.harvest_ns / 1e9,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.tracker.switches",
        "{switch}",
        "Trackers that took over from one that failed",
        lambda s: s.tracker_switches,
        counter=True,
    ),
    VmMetric("frostline.vm.sync", "{window}", "Times in sync mode", lambda s: s.sync_windows, counter=True),
    VmMetric(
        "frostline.vm.sync.long", "{window}", "Of them longer than 5 ms", lambda s: s.sync_long_windows, counter=True
    ),
    VmMetric("frostline.vm.evictions", "{page}", "Pages stored and punched", lambda s: s.evictions, counter=True),
    VmMetric(
        "frostline.vm.evictions.cancelled",
        "{page}",
        "Pages touched while frozen",
        lambda s: s.evictions_cancelled,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.rejected",
        "{page}",
        "Pages that did not compress well enough",
        lambda s: s.rejected_pages,
        counter=True,
    ),
    VmMetric("frostline.vm.faults", "{fault}", "Pages loaded because touched", lambda s: s.faults, counter=True),
    VmMetric(
        "frostline.vm.zero_fills",
        "{fault}",
        "First touches of memory that was never there",
        lambda s: s.zero_fills,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.write_faults",
        "{fault}",
        "Touched while frozen, resolved by un-protecting",
        lambda s: s.write_faults,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.minor_faults",
        "{fault}",
        "Touches of pages that were in host RAM but not mapped",
        lambda s: s.minor_faults,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.prefetched",
        "{page}",
        "Pages brought back ahead of a touch",
        lambda s: s.prefetched_pages,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.drained", "{page}", "Pages brought back by draining", lambda s: s.drained_pages, counter=True
    ),
    VmMetric(
        "frostline.vm.removed",
        "{page}",
        "Stored copies forgotten because the VMM freed the memory",
        lambda s: s.removed_pages,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.recovered",
        "{page}",
        "In-flight pages put right by takeovers",
        lambda s: s.recovered_pages,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.checksum.errors",
        "{page}",
        "Stored pages whose checksum failed",
        lambda s: s.checksum_errors,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.poisoned",
        "{page}",
        "Pages poisoned instead of passed on wrong",
        lambda s: s.poisoned_pages,
        counter=True,
    ),
    VmMetric(
        "frostline.vm.stall",
        "s",
        "Time that faulting threads waited for loads",
        lambda s: s.stall_ns / 1e9,
        counter=True,
    ),
    VmMetric("frostline.vm.takeovers", "{pager}", "Pagers after the first", lambda s: s.takeovers, counter=True),
)


@dataclass(slots=True)
class AgentCounts:
    """What the agent itself counts."""

    cycles: int = 0
    cycle_seconds: float = 0.0
    records_lost: int = 0
    pager_restarts: int = 0
    sets_refused: int = 0


# name, unit, description, counter; in the order of docs/metrics.md
AGENT_METRICS: Final[tuple[tuple[str, str, str, bool], ...]] = (
    ("frostline.agent.vms", "{vm}", "VMs found, by phase", False),
    ("frostline.agent.session.up", "1", "1 while there is a session with the controller", False),
    ("frostline.agent.reports", "{report}", "Reports sent on the present and earlier sessions", True),
    ("frostline.agent.budget_sets", "{set}", "Budget sets taken from the controller", True),
    ("frostline.agent.budget_sets.refused", "{set}", "Budget sets refused whole", True),
    ("frostline.agent.epoch", "1", "Highest controller epoch seen", False),
    ("frostline.agent.cycles", "{cycle}", "Cycles of the agent", True),
    ("frostline.agent.cycle.duration", "s", "How long the last cycle took", False),
    ("frostline.agent.records.lost", "{record}", "Pagers' records overwritten before they were read", True),
    ("frostline.agent.pager.restarts", "{pager}", "Pagers started because another had ended", True),
)
LATENCY_METRIC: Final = (
    "frostline.vm.fault.answered",
    "{fault}",
    "Faults answered within `le` seconds, cumulative over buckets",
)


class AgentMetrics:
    """Registers the instruments; everything is read at the scrape."""

    def __init__(
        self,
        meter: Meter,
        host: Host,
        counts: AgentCounts,
        session: Callable[[], SessionStatus | None],
        epoch: Callable[[], int],
    ) -> None:
        self._host: Final = host
        for metric in VM_METRICS:
            create = meter.create_observable_counter if metric.counter else meter.create_observable_gauge
            create(metric.name, callbacks=[self._observer(metric)], unit=metric.unit, description=metric.description)
        values: dict[str, Callable[[], Iterable[Observation]]] = {
            "frostline.agent.vms": self._phases,
            "frostline.agent.session.up": lambda: [
                Observation(int((status := session()) is not None and status.connected))
            ],
            "frostline.agent.reports": lambda: [Observation(status.reports_sent if (status := session()) else 0)],
            "frostline.agent.budget_sets": lambda: [Observation(status.sets_taken if (status := session()) else 0)],
            "frostline.agent.budget_sets.refused": lambda: [Observation(counts.sets_refused)],
            "frostline.agent.epoch": lambda: [Observation(epoch())],
            "frostline.agent.cycles": lambda: [Observation(counts.cycles)],
            "frostline.agent.cycle.duration": lambda: [Observation(counts.cycle_seconds)],
            "frostline.agent.records.lost": lambda: [Observation(counts.records_lost)],
            "frostline.agent.pager.restarts": lambda: [
                Observation(counts.pager_restarts + sum(vm.pager_restarts for vm in host))
            ],
        }
        for name, unit, description, counter in AGENT_METRICS:
            create = meter.create_observable_counter if counter else meter.create_observable_gauge
            create(name, callbacks=[_just(values[name])], unit=unit, description=description)
        name, unit, description = LATENCY_METRIC
        meter.create_observable_counter(name, callbacks=[self._latencies], unit=unit, description=description)

    def _observer(self, metric: VmMetric) -> Callable[[CallbackOptions], Iterable[Observation]]:
        def observe(_options: CallbackOptions) -> Iterator[Observation]:
            for vm in list(self._host):
                status = vm.status
                if status is not None:
                    more = metric.attributes(status) if metric.attributes else {}
                    yield Observation(max(0, metric.value(status)), {**_labels(vm), **more})

        return observe

    def _phases(self) -> Iterable[Observation]:
        phases = [vm.phase for vm in list(self._host)]
        return [Observation(phases.count(phase), {"phase": phase.value}) for phase in Phase if phase is not Phase.GONE]

    def _latencies(self, _options: CallbackOptions) -> Iterator[Observation]:
        """Every fourth bucket (a factor of 2): 16 series a VM, enough for a heat map."""
        for vm in list(self._host):
            if vm.status is None:
                continue
            counted = 0
            for index, count in enumerate(vm.status.fault_latency):
                counted += count
                if index % 4 == 3:
                    yield Observation(counted, {**_labels(vm), "le": f"{LATENCY_BUCKET_EDGES_NS[index] / 1e9:.9f}"})


def _just(values: Callable[[], Iterable[Observation]]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda _options: values()


def _labels(vm: Vm) -> dict[str, str]:
    return {"vm_id": vm.vm_id, "vm_name": vm.vmm.name}
