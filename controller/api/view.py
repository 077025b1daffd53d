# SPDX-License-Identifier: Apache-2.0
"""Records as messages of the operator API."""

from __future__ import annotations

import time

from frostline.controller.fleet.fleet import Fleet
from frostline.controller.fleet.freezes import host_key
from frostline.controller.fleet.records import HostRecord, VmRecord
from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2 as op


def saved_bytes(state: pb.VmState) -> int:
    """Host RAM that evicting saved: what is away less what keeping it away costs, never below 0."""
    return max(state.evicted_bytes - state.pool_bytes - state.metadata_bytes, 0)


def host_message(fleet: Fleet, host: HostRecord) -> op.Host:
    states = [vm.state for vm in host.vms.values() if vm.state is not None]
    return op.Host(
        node_id=host.node_id,
        state=fleet.host_state(host),
        last_seen_seconds=max(time.monotonic() - host.last_seen, 0.0),
        vm_count=len(host.vms),
        host_memory_bytes=host.host_memory_bytes,
        host_available_bytes=host.host_available_bytes,
        memory_bytes=sum(vm.identity.memory_bytes for vm in host.vms.values()),
        resident_bytes=sum(state.resident_bytes for state in states),
        evicted_bytes=sum(state.evicted_bytes for state in states),
        pool_bytes=sum(state.pool_bytes for state in states),
        saved_bytes=sum(saved_bytes(state) for state in states),
        budget_version_desired=host.version_desired,
        budget_version_applied=host.version_applied,
        epoch=host.epoch,
        frozen=fleet.freezes.fleet is not None or fleet.freezes.get(host_key(host.node_id)) is not None,
        agent_version=host.agent_version,
        note=host.note,
    )


def decision_message(vm: VmRecord) -> op.Decision | None:
    decision = vm.decision
    if decision is None:
        return None
    return op.Decision(
        at_unix_ns=vm.decided_at_unix_ns,
        version=vm.pushed_version,
        mode=pb.Mode.ValueType(int(decision.mode)),
        budget_bytes=decision.budget_bytes,
        planned_bytes=decision.planned_bytes,
        cold_bytes=decision.cold_bytes,
        min_age_seconds=decision.min_age_seconds,
        reason=pb.Reason.ValueType(decision.reason),
        policy_class=decision.policy_class,
        sentence=decision.sentence,
    )


def vm_message(host: HostRecord, vm: VmRecord, *, histogram: bool) -> op.Vm:
    state: pb.VmState | None = None
    if vm.state is not None:
        state = pb.VmState()
        state.CopyFrom(vm.state)
        if not histogram:
            state.ClearField("histogram")
    return op.Vm(
        identity=vm.identity,
        node_id=host.node_id,
        state=state,
        decision=decision_message(vm),
        ack=vm.ack,
        report_age_seconds=max(time.monotonic() - vm.state_at, 0.0) if vm.state_at is not None else 0.0,
    )
