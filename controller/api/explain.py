# SPDX-License-Identifier: Apache-2.0
"""Why a VM has the budget that it has, in sentences."""

from __future__ import annotations

import time

from frostline.controller.api.view import decision_message
from frostline.controller.fleet.fleet import Fleet
from frostline.controller.fleet.freezes import FLEET, Freeze, host_key, vm_key
from frostline.controller.fleet.records import HostRecord, VmRecord
from frostline.controller.policy.document import PolicyMode
from frostline.controller.policy.snapshot import Decision
from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2 as op
from frostline.wire.units import format_duration, format_rate, format_size

_MODES = {
    PolicyMode.OFF: "off: it is not attached",
    PolicyMode.OBSERVE: "observe: it is scanned, nothing else",
    PolicyMode.PLAN: "plan: budgets are decided and shown, none is sent",
    PolicyMode.ENFORCE: "enforce: budgets are sent and applied",
}
_HOLDING = {
    pb.REASON_LEASE: "The agent holds back: no lease is in force.",
    pb.REASON_BRAKE: "The local brake holds it back: its vCPUs wait too much for evicted pages.",
    pb.REASON_TIER_FULL: "Nothing more is evicted: the pool is full.",
    pb.REASON_NOTHING_COLD: "Nothing is evicted right now: no page is old enough.",
    pb.REASON_LIMITED_LOCALLY: "The host's own limits allow less than the budget.",
    pb.REASON_CORRUPT: "Nothing more is evicted: a checksum failed.",
    pb.REASON_NO_TRACKER: "Nothing is evicted: no tracker that its host allows works; see `frostline-agent probe`.",
    pb.REASON_FAILED: "Nothing is evicted right now: the last try failed; the pager's log says why.",
    pb.REASON_DRAINING: "Its pager brings everything back.",
    pb.REASON_UNSAFE: "The agent holds back: it is not safe to evict from it now.",
}


def explain(fleet: Fleet, host: HostRecord, vm: VmRecord, *, store_problem: str, epoch: int) -> op.ExplainResponse:
    """The decision's own sentence first; the details say what it rests on and what became of it."""
    decision = vm.decision
    label = vm.identity.name or vm.identity.vm_id
    details: list[str] = []
    if decision is None:
        return op.ExplainResponse(
            sentence=f"Nothing was decided for {label} yet: its host has just said hello.",
            reason=pb.REASON_WARMUP,
            details=_surroundings(fleet, host, vm, store_problem, epoch),
        )
    details += _policy_details(fleet, vm, decision)
    details += _effect_details(host, vm, decision)
    details += _surroundings(fleet, host, vm, store_problem, epoch)
    return op.ExplainResponse(
        sentence=decision.sentence,
        reason=pb.Reason.ValueType(decision.reason),
        decision=decision_message(vm),
        details=details,
    )


def _policy_details(fleet: Fleet, vm: VmRecord, decision: Decision) -> list[str]:
    rule, memory_bytes = decision.rule, vm.identity.memory_bytes
    floor, cap = rule.floor.of(memory_bytes), rule.cap.of(memory_bytes)
    version = fleet.policy.version
    return [
        f"Policy {f'version {version}' if version else '(built in)'}, class {decision.policy_class}.",
        f"Mode {_MODES[decision.mode]}.",
        f"Cold means idle for {format_duration(rule.min_idle_age_seconds)}: {format_size(decision.cold_bytes)}.",
        f"Floor {rule.floor}: at least {format_size(floor)} of what the guest has filled stays in RAM.",
        f"Cap {rule.cap}: at most {format_size(cap)} may be away.",
        f"Eviction rate: {format_rate(rule.rate_bytes_per_second)}.",
    ]


def _effect_details(host: HostRecord, vm: VmRecord, decision: Decision) -> list[str]:
    details = [f"Budget {format_size(decision.budget_bytes)}, planned {format_size(decision.planned_bytes)}."]
    ack, state = vm.ack, vm.state
    if ack is not None and ack.version:
        if ack.accepted:
            details.append(f"The agent applied set {ack.version}: {format_size(ack.effective_bytes)} in effect.")
        else:
            why = pb.Reason.Name(ack.reason).removeprefix("REASON_").lower().replace("_", " ")
            details.append(f"The agent did not take set {ack.version}: {ack.detail or why}.")
    elif vm.pushed_version:
        details.append(f"Set {vm.pushed_version} was sent and is not answered yet.")
    if state is None:
        return details
    details.append(
        f"Away now: {format_size(state.evicted_bytes)}; in RAM: {format_size(state.resident_bytes)}; "
        f"pool: {format_size(state.pool_bytes)}."
    )
    if state.cold_estimate_bytes:
        details.append(
            f"Nobody is attached to it; to the host's kernel about {format_size(state.cold_estimate_bytes[0])} of its "
            "cgroup look cold, which is an estimate."
        )
    if state.effective_budget_bytes != decision.budget_bytes and decision.mode is PolicyMode.ENFORCE:
        details.append(f"The pager works with {format_size(state.effective_budget_bytes)}.")
    if decision.mode is PolicyMode.ENFORCE:
        details.append(f"The lease had {format_duration(round(state.lease_remaining_seconds, 1))} left when reported.")
        if 0 < state.brake_permille < 1000:
            details.append(f"The local brake leaves {state.brake_permille / 10:g} % of the budget.")
        if state.holding_back in _HOLDING:
            details.append(_HOLDING[state.holding_back])
    return details


def _surroundings(fleet: Fleet, host: HostRecord, vm: VmRecord, store_problem: str, epoch: int) -> list[str]:
    details: list[str] = []
    for key, what in (
        (FLEET, "The fleet"),
        (host_key(host.node_id), "The host"),
        (vm_key(vm.identity.vm_id), "The VM"),
    ):
        freeze = fleet.freezes.get(key)
        if freeze is not None:
            details.append(_frozen(what, freeze))
    silent = format_duration(round(max(time.monotonic() - host.last_seen, 0.0), 1))
    state = fleet.host_state(host)
    if state == op.HOST_STATE_GONE:
        details.append(f"Host {host.node_id} left {silent} ago: its leases run out by themselves.")
    elif state == op.HOST_STATE_SUSPECT:
        details.append(f"Host {host.node_id} was last heard {silent} ago: its lease is not renewed.")
    if vm.problem:
        details.append(f"The newest report of it was not believed: {vm.problem}.")
    if host.note:
        details.append(f"Host {host.node_id}: {host.note}.")
    if epoch == 0:
        details.append("This controller has no epoch yet, so it sends no budgets: Redis has to answer once.")
    if store_problem:
        details.append(f"The state store is in trouble: {store_problem}.")
    return details


def _frozen(what: str, freeze: Freeze) -> str:
    by = f" by {freeze.author}" if freeze.author else ""
    why = f": {freeze.why}" if freeze.why else ""
    how = "was drained and stays frozen until it is unfrozen" if freeze.drain else "is frozen"
    return f"{what} {how}{by}{why}."
