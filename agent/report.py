# SPDX-License-Identifier: Apache-2.0
"""Turns what the agent knows into reports: full or delta, numbered, never queued."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from frostline.agent.mglru import COLD_AGES_SECONDS, ColdEstimate
from frostline.agent.procfs import HostMemory, ProcessId, shared_resident_bytes
from frostline.agent.vm import Phase, Vm
from frostline.native import AGE_BIN_EDGES, AGE_BINS, PAGE_BYTES, Freeze, Refusal, State, Status, Tracker, Why
from frostline.v1 import common_pb2, session_pb2

Reason = common_pb2.Reason

# What the pager says holds it back, in the words of explain. BUDGET and RATE depend on the grant, see below.
_HOLDING_BACK: Final[Mapping[Why, common_pb2.Reason.ValueType]] = MappingProxyType(
    {
        Why.EVICTING: Reason.REASON_GRANTED,
        Why.LEASE: Reason.REASON_LEASE,
        Why.BUDGET: Reason.REASON_CAP,
        Why.NOTHING_COLD: Reason.REASON_NOTHING_COLD,
        Why.RATE: Reason.REASON_GRANTED,
        Why.BRAKE: Reason.REASON_BRAKE,
        Why.TIER_FULL: Reason.REASON_TIER_FULL,
        Why.CORRUPT: Reason.REASON_CORRUPT,
        Why.DRAIN: Reason.REASON_DRAINING,
        Why.UNSAFE: Reason.REASON_UNSAFE,
        Why.FAILED: Reason.REASON_FAILED,
        Why.NO_TRACKER: Reason.REASON_NO_TRACKER,
    }
)
_BUDGET_REASONS: Final = frozenset(
    {
        Reason.REASON_FLOOR,
        Reason.REASON_CAP,
        Reason.REASON_MODE,
        Reason.REASON_WARMUP,
        Reason.REASON_FROZEN,
        Reason.REASON_DRAINING,
        Reason.REASON_LIMITED_LOCALLY,
        Reason.REASON_INVALID,
        Reason.REASON_NOTHING_COLD,
        Reason.REASON_TIER_FULL,
    }
)
_PAGER_STATES: Final[Mapping[State, common_pb2.PagerState.ValueType]] = MappingProxyType(
    {
        State.STARTING: common_pb2.PAGER_STATE_UNSPECIFIED,
        State.ACTIVE: common_pb2.PAGER_STATE_ACTIVE,
        State.HOLD: common_pb2.PAGER_STATE_HOLD,
        State.DRAIN: common_pb2.PAGER_STATE_DRAIN,
        State.CORRUPT: common_pb2.PAGER_STATE_CORRUPT,
        State.DETACHED: common_pb2.PAGER_STATE_DETACHED,
        State.RELEASED: common_pb2.PAGER_STATE_RELEASED,
    }
)


@dataclass(frozen=True, slots=True)
class _Promotions:
    """Where the last period ended, and the rates it gave."""

    counts: tuple[int, ...]
    at_ns: int
    per_minute: tuple[float, ...]


class PromotionRates:
    """Accesses per minute from the vaults' cumulative counts, over whole scans of at least ``min_period_seconds``."""

    def __init__(self) -> None:
        self.min_period_seconds = 0.0
        self._last: dict[ProcessId, _Promotions] = {}

    def update(self, process: ProcessId, status: Status) -> tuple[float, ...]:
        """The rates of the newest complete period."""
        last = self._last.get(process)
        if last is None or any(new < old for new, old in zip(status.promotions, last.counts, strict=True)):
            last = _Promotions((0,) * AGE_BINS, status.attached_at_ns, (0.0,) * AGE_BINS)
        period_seconds = (status.last_scan_ns - last.at_ns) / 1e9
        if status.last_scan_ns and period_seconds > 0 and period_seconds >= self.min_period_seconds:
            rates = tuple(
                max(0, new - old) * 60.0 / period_seconds
                for new, old in zip(status.promotions, last.counts, strict=True)
            )
            last = _Promotions(status.promotions, status.last_scan_ns, rates)
        self._last[process] = last
        return last.per_minute

    def forget(self, gone: Iterable[ProcessId]) -> None:
        for process in gone:
            self._last.pop(process, None)


def holding_back(vm: Vm, status: Status) -> common_pb2.Reason.ValueType:
    """Why nothing is evicted from a served VM right now."""
    if status.why in (Why.BUDGET, Why.LEASE) and vm.grant is not None and vm.grant.reason in _BUDGET_REASONS:
        return vm.grant.reason
    return _HOLDING_BACK[status.why]


def reportable(vm: Vm) -> bool:
    """A VM whose size is not known yet is no VM to a controller; it is in the next report."""
    return vm.phase is not Phase.GONE and vm.memory_bytes > 0


def identity(vm: Vm) -> common_pb2.VmIdentity:
    return common_pb2.VmIdentity(
        vm_id=vm.vm_id,
        name=vm.vmm.name,
        uuid=vm.vmm.uuid,
        pid=vm.vmm.process.pid,
        start_time_ticks=vm.vmm.process.start_time_ticks,
        memory_bytes=vm.memory_bytes,
        vm_class=vm.vm_class,
    )


def vm_state(vm: Vm, promotions_per_minute: tuple[float, ...]) -> common_pb2.VmState:
    """One VM as it is now; without a vault there is only who it is and why it is not served."""
    state = common_pb2.VmState(vm_id=vm.vm_id, memory_bytes=vm.memory_bytes)
    if vm.phase in (Phase.REFUSED, Phase.FOREIGN):
        state.refusal = _refusal(vm.refusal)
        state.refusal_detail = vm.refusal_detail
    status = vm.status
    if status is None:
        state.resident_bytes = min(shared_resident_bytes(vm.vmm.process.pid), vm.memory_bytes)
        state.holding_back = _unattached_reason(vm)
        if vm.cold_estimate is not None:
            _fill_estimate(state, vm.cold_estimate)
        return state
    if status.pager_alive:
        state.pager_state = _PAGER_STATES[status.state]
    leased = status.lease_remaining_seconds()
    state.holding_back = holding_back(vm, status)
    state.memory_bytes = status.memory_bytes
    state.tracker = _tracker(status.tracker)
    state.tracker_grain_pages = status.tracker_grain
    state.freeze_method = _freeze_method(status.freeze)
    state.resident_bytes = status.resident_bytes
    state.swapped_bytes = status.swapped_bytes
    state.evicted_bytes = status.evicted_bytes
    state.evicted_zero_bytes = status.evicted_zero_pages * PAGE_BYTES
    state.evicted_same_bytes = status.evicted_same_pages * PAGE_BYTES
    state.evicted_ram_bytes = status.evicted_ram_pages * PAGE_BYTES
    state.stored_bytes = status.stored_bytes
    state.pool_bytes = status.pool_bytes
    state.metadata_bytes = status.metadata_bytes
    state.working_set_bytes = status.working_set_bytes
    state.effective_budget_bytes = status.budget_bytes if leased > 0 else 0
    state.effective_version = status.budget_generation
    state.lease_remaining_seconds = leased
    state.brake_permille = status.brake_permille
    state.scan_interval_seconds = status.scan_interval_ns / 1e9
    state.fault_p50_ns = status.fault_percentile_ns(500)
    state.fault_p99_ns = status.fault_percentile_ns(990)
    state.pager_pid = status.pager_pid if status.pager_alive else 0
    state.attached_seconds = max(0, status.now_ns - status.attached_at_ns) / 1e9
    _fill_counters(state.counters, status)
    _fill_histogram(state.histogram, status, promotions_per_minute)
    return state


def _refusal(refusal: Refusal) -> common_pb2.Refusal.ValueType:
    """The numbers are the same on both sides; a test holds them together."""
    return common_pb2.Refusal.Value(f"REFUSAL_{refusal.name}") if refusal else common_pb2.REFUSAL_UNSPECIFIED


def _tracker(tracker: Tracker) -> common_pb2.Tracker.ValueType:
    name = tracker.name if tracker else "UNSPECIFIED"
    return common_pb2.Tracker.Value(f"TRACKER_{name}")


def _freeze_method(freeze: Freeze) -> common_pb2.FreezeMethod.ValueType:
    name = freeze.name if freeze else "UNSPECIFIED"
    return common_pb2.FreezeMethod.Value(f"FREEZE_METHOD_{name}")


def _unattached_reason(vm: Vm) -> common_pb2.Reason.ValueType:
    if vm.phase in (Phase.REFUSED, Phase.FOREIGN):
        return Reason.REASON_UNSAFE
    if vm.grant is not None and not vm.grant.attach:
        return vm.grant.reason
    return Reason.REASON_LEASE


def _fill_estimate(state: common_pb2.VmState, estimate: ColdEstimate) -> None:
    state.cold_estimate_min_age_seconds.extend(COLD_AGES_SECONDS)
    state.cold_estimate_bytes.extend(estimate.cold_bytes)
    state.cold_estimate_looked_seconds = estimate.looked_seconds
    state.cold_estimate_sharers = estimate.sharers


def _fill_counters(counters: common_pb2.Counters, status: Status) -> None:
    for field in common_pb2.Counters.DESCRIPTOR.fields:
        setattr(counters, field.name, getattr(status, field.name))


def _fill_histogram(histogram: common_pb2.Histogram, status: Status, per_minute: tuple[float, ...]) -> None:
    interval_seconds = status.scan_interval_ns / 1e9
    histogram.min_age_seconds.extend(edge * interval_seconds for edge in AGE_BIN_EDGES)
    histogram.resident_bytes.extend(status.resident_age_bytes)
    histogram.evicted_bytes.extend(status.evicted_age_bytes)
    histogram.promotions_per_minute.extend(per_minute)


class ReportBuilder:
    """Reports of one stream: numbers them and remembers what the other side has been told."""

    def __init__(self, rates: PromotionRates) -> None:
        self._rates: Final = rates
        self.sequence = 0
        self._told_identity: dict[str, bytes] = {}
        self._told_state: dict[str, bytes] = {}

    def build(
        self, vms: Iterable[Vm], memory: HostMemory, *, full: bool, traceparent: str, now_unix_ns: int
    ) -> session_pb2.Report:
        """The next report; call it when it can be sent at once, for it counts as told."""
        self.sequence += 1
        report = session_pb2.Report(
            sequence=self.sequence,
            full=full,
            host_memory_bytes=memory.total_bytes,
            host_available_bytes=memory.available_bytes,
            traceparent=traceparent,
            taken_at_unix_ns=now_unix_ns,
        )
        identities: dict[str, bytes] = {}
        states: dict[str, bytes] = {}
        for vm in vms:
            if not reportable(vm):
                continue
            who = identity(vm)
            identities[vm.vm_id] = who.SerializeToString(deterministic=True)
            if full or self._told_identity.get(vm.vm_id) != identities[vm.vm_id]:
                report.vms.append(who)
            rates = self._rates.update(vm.vmm.process, vm.status) if vm.status else ()
            state = vm_state(vm, rates)
            states[vm.vm_id] = _comparable(state)
            if full or self._told_state.get(vm.vm_id) != states[vm.vm_id]:
                report.states.append(state)
        report.gone_vm_ids.extend(sorted(self._told_identity.keys() - identities.keys()))
        self._told_identity, self._told_state = identities, states
        return report


def _comparable(state: common_pb2.VmState) -> bytes:
    """Without what only tells that time has passed."""
    still = common_pb2.VmState()
    still.CopyFrom(state)
    still.lease_remaining_seconds = 0
    still.attached_seconds = 0
    still.cold_estimate_looked_seconds = 0
    return still.SerializeToString(deterministic=True)
