# SPDX-License-Identifier: Apache-2.0
"""What --json prints: the API's messages under names that do not change.

Sizes are integers in bytes, times are ISO 8601 in UTC, ages and durations are seconds, unknown is null. docs/cli.md
lists every key, and a test holds that list against this module.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from frostline.controller.cli.words import (
    freeze_method_word,
    host_word,
    mode_word,
    pager_word,
    reason_word,
    refusal_word,
    tracker_word,
)
from frostline.v1 import common_pb2, operator_pb2

Json = dict[str, Any]


def saved_bytes(state: common_pb2.VmState) -> int:
    """Host RAM that a VM's evictions really saved: what is away less the pool and the metadata; never below 0."""
    return max(0, state.evicted_bytes - state.pool_bytes - state.metadata_bytes)


def iso_time(unix_ns: int) -> str | None:
    if unix_ns == 0:
        return None
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def host_document(host: operator_pb2.Host) -> Json:
    return {
        "node_id": host.node_id,
        "state": host_word(host.state),
        "last_seen_seconds": round(host.last_seen_seconds, 3),
        "vms": host.vm_count,
        "host_memory_bytes": host.host_memory_bytes,
        "host_available_bytes": host.host_available_bytes,
        "memory_bytes": host.memory_bytes,
        "resident_bytes": host.resident_bytes,
        "evicted_bytes": host.evicted_bytes,
        "pool_bytes": host.pool_bytes,
        "saved_bytes": host.saved_bytes,
        "budget_version_desired": host.budget_version_desired,
        "budget_version_applied": host.budget_version_applied,
        "epoch": host.epoch,
        "frozen": host.frozen,
        "agent_version": host.agent_version,
        "note": host.note or None,
    }


def hosts_document(answer: operator_pb2.ListHostsResponse) -> Json:
    return {
        "hosts": [host_document(host) for host in answer.hosts],
        "store_available": answer.store_available,
        "store_problem": answer.store_problem or None,
        "policy_version": answer.policy_version,
        "fleet_frozen": answer.fleet_frozen,
    }


def vm_document(vm: operator_pb2.Vm) -> Json:
    identity, state = vm.identity, vm.state
    document: Json = {
        "vm_id": identity.vm_id or state.vm_id,
        "name": identity.name,
        "uuid": identity.uuid or None,
        "node_id": vm.node_id,
        "pid": identity.pid,
        "class": vm.decision.policy_class or identity.vm_class,
        "mode": mode_word(vm.decision.mode),
        "reason": reason_word(vm.decision.reason),
        "pager_state": pager_word(state.pager_state) or None,
        "refusal": refusal_word(state.refusal) or None,
        "refusal_detail": state.refusal_detail or None,
        "holding_back": reason_word(state.holding_back) or None,
        "memory_bytes": state.memory_bytes or identity.memory_bytes,
        "resident_bytes": state.resident_bytes,
        "swapped_bytes": state.swapped_bytes,
        "evicted_bytes": state.evicted_bytes,
        "evicted_zero_bytes": state.evicted_zero_bytes,
        "evicted_same_bytes": state.evicted_same_bytes,
        "evicted_ram_bytes": state.evicted_ram_bytes,
        "stored_bytes": state.stored_bytes,
        "pool_bytes": state.pool_bytes,
        "metadata_bytes": state.metadata_bytes,
        "saved_bytes": saved_bytes(state),
        "working_set_bytes": state.working_set_bytes,
        "budget": {
            "desired_bytes": vm.decision.budget_bytes,
            "desired_version": vm.decision.version,
            "effective_bytes": state.effective_budget_bytes,
            "effective_version": state.effective_version,
            "lease_remaining_seconds": round(state.lease_remaining_seconds, 3),
        },
        "decision": decision_document(vm.decision) if vm.HasField("decision") else None,
        "ack": ack_document(vm.ack) if vm.HasField("ack") else None,
        "brake_permille": state.brake_permille,
        "tracker": tracker_word(state.tracker) or None,
        "tracker_grain_pages": state.tracker_grain_pages,
        "freeze_method": freeze_method_word(state.freeze_method) or None,
        "cold_estimate": estimate_document(state) if state.cold_estimate_bytes else None,
        "scan_interval_seconds": state.scan_interval_seconds,
        "fault_p50_ns": state.fault_p50_ns,
        "fault_p99_ns": state.fault_p99_ns,
        "pager_pid": state.pager_pid or None,
        "attached_seconds": round(state.attached_seconds, 3),
        "report_age_seconds": round(vm.report_age_seconds, 3),
        "counters": {
            field.name: getattr(state.counters, field.name) for field in common_pb2.Counters.DESCRIPTOR.fields
        },
    }
    if state.HasField("histogram"):
        document["histogram"] = histogram_document(state.histogram)
    return document


def estimate_document(state: common_pb2.VmState) -> Json:
    """Of a VM that nobody is attached to."""
    pairs = zip(state.cold_estimate_min_age_seconds, state.cold_estimate_bytes, strict=False)
    return {
        "ages": [{"min_age_seconds": age, "cold_bytes": size} for age, size in pairs],
        "looked_seconds": round(state.cold_estimate_looked_seconds, 3),
        "sharers": state.cold_estimate_sharers,
        "caveats": "an estimate for the whole cgroup, the VMM's own memory included, as of when the kernel last looked",
    }


def decision_document(decision: operator_pb2.Decision) -> Json:
    return {
        "at": iso_time(decision.at_unix_ns),
        "version": decision.version,
        "mode": mode_word(decision.mode),
        "class": decision.policy_class,
        "reason": reason_word(decision.reason),
        "sentence": decision.sentence,
        "budget_bytes": decision.budget_bytes,
        "planned_bytes": decision.planned_bytes,
        "cold_bytes": decision.cold_bytes,
        "min_age_seconds": decision.min_age_seconds,
    }


def ack_document(ack: operator_pb2.VmAck) -> Json:
    return {
        "accepted": ack.accepted,
        "reason": reason_word(ack.reason),
        "detail": ack.detail,
        "effective_bytes": ack.effective_bytes,
        "version": ack.version,
    }


def histogram_document(histogram: common_pb2.Histogram) -> list[Json]:
    """One object a bin. `max_age_seconds` is null for the last one, which is open."""
    ages = list(histogram.min_age_seconds)
    ends: list[float | None] = [*ages[1:], None]
    return [
        {
            "min_age_seconds": age,
            "max_age_seconds": end,
            "resident_bytes": _at(histogram.resident_bytes, index),
            "evicted_bytes": _at(histogram.evicted_bytes, index),
            "promotions_per_minute": round(_at(histogram.promotions_per_minute, index), 3),
        }
        for index, (age, end) in enumerate(zip(ages, ends, strict=True))
    ]


def policy_document(policy: operator_pb2.Policy, *, with_text: bool) -> Json:
    document: Json = {
        "version": policy.version,
        "in_force": policy.in_force,
        "author": policy.author,
        "comment": policy.comment,
        "created_at": iso_time(policy.created_at_unix_ns),
    }
    if with_text:
        document["document"] = policy.document
    return document


def explain_document(vm: str, answer: operator_pb2.ExplainResponse) -> Json:
    return {
        "vm": vm,
        "sentence": answer.sentence,
        "reason": reason_word(answer.reason),
        "details": list(answer.details),
        "decision": decision_document(answer.decision) if answer.HasField("decision") else None,
    }


def watch_document(answer: operator_pb2.WatchResponse, at_unix_ns: int) -> Json:
    return {
        "at": iso_time(at_unix_ns),
        "hosts": [host_document(host) for host in answer.hosts],
        "vms": [vm_document(vm) for vm in answer.vms],
        "gone_vm_ids": list(answer.gone_vm_ids),
    }


def _at(values: Any, index: int) -> Any:
    # A message whose fields differ in length breaks the contract; a missing value is shown as none.
    return values[index] if index < len(values) else 0
