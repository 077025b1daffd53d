# SPDX-License-Identifier: Apache-2.0
"""The agent's own picture of itself and its VMs, as plain data for the admin socket and `--json`."""

from __future__ import annotations

import time
from typing import Any

from frostline.agent.authority import Authority
from frostline.agent.host import Host
from frostline.agent.report import holding_back
from frostline.agent.session import SessionStatus
from frostline.agent.settings import AgentSettings
from frostline.agent.trackers import trackers_text
from frostline.agent.vm import Vm
from frostline.native import Tracker
from frostline.v1 import common_pb2


def status_document(
    settings: AgentSettings,
    trackers: tuple[Tracker, ...],
    host: Host,
    authority: Authority,
    session: SessionStatus | None,
) -> dict[str, Any]:
    """Sizes are bytes, times seconds. ``trackers`` and the scan interval are what new pagers are given."""
    return {
        "agent": {
            "node_id": settings.node_id,
            "mode": "standalone" if settings.policy else "run",
            "controller": settings.controller or None,
            "connected": session.connected if session else None,
            "controller_id": session.controller_id if session else None,
            "session_seconds": round(time.monotonic() - session.since, 3) if session else None,
            "last_error": session.last_error if session else None,
            "highest_epoch": authority.highest_epoch,
            "applied_version": authority.applied_version,
            "allow_evict": authority.limits.allow_evict,
            "limits": authority.limits.source,
            "pool_full": authority.pool_full,
            "trackers": trackers_text(trackers),
            "scan_interval_seconds": authority.limits.document.scan_interval,  # None: the pagers' own
        },
        "vms": [vm_document(vm) for vm in sorted(host, key=lambda vm: (vm.vmm.name, vm.vm_id))],
    }


def vm_document(vm: Vm) -> dict[str, Any]:
    """One VM: who, where it stands, and its numbers while it has a vault."""
    vm.read_status()
    grant, status = vm.grant, vm.status
    document: dict[str, Any] = {
        "vm_id": vm.vm_id,
        "name": vm.vmm.name,
        "uuid": vm.vmm.uuid,
        "pid": vm.vmm.process.pid,
        "start_time_ticks": vm.vmm.process.start_time_ticks,
        "class": vm.vm_class,
        "phase": vm.phase.value,
        "wanted": vm.wanted,
        "held": vm.held.value,
        "refusal": vm.refusal.word if vm.refusal else "",
        "refusal_detail": vm.refusal_detail,
        "memory_bytes": vm.memory_bytes,
        "pager_restarts": vm.pager_restarts,
        "last_takeover_seconds": round(vm.last_takeover_seconds, 4),
        "cold_estimate": vm.cold_estimate.document() if vm.cold_estimate and status is None else None,
        "no_estimate_why": vm.no_estimate_why,
        "grant": None,
        "pager": None,
    }
    if grant is not None:
        document["grant"] = {
            "mode": common_pb2.Mode.Name(grant.mode).removeprefix("MODE_").lower(),
            "bytes": grant.bytes,
            "rate_bytes_per_second": grant.rate_bytes_per_second,
            "min_age_seconds": grant.min_age_seconds,
            "reason": common_pb2.Reason.Name(grant.reason).removeprefix("REASON_").lower(),
            "why": grant.sentence,
            "version": vm.grant_version,
        }
    if status is not None:
        reason = common_pb2.Reason.Name(holding_back(vm, status))
        document["pager"] = {
            "pid": status.pager_pid if status.pager_alive else 0,
            "state": status.state.word,
            "why": status.why.word,
            "holding_back": reason.removeprefix("REASON_").lower(),
            "takeovers": status.takeovers,
            "takeover_seconds": status.takeover_ns / 1e9,
            "attach_stop_seconds": status.attach_stop_ns / 1e9,
            "budget_bytes": status.budget_bytes,
            "lease_seconds": round(status.lease_remaining_seconds(), 3),
            "brake_permille": status.brake_permille,
            "tracker": status.tracker.word,
            "tracker_grain_pages": status.tracker_grain,
            "freeze_method": status.freeze.word,
            "tracker_switches": status.tracker_switches,
            "resident_bytes": status.resident_bytes,
            "swapped_bytes": status.swapped_bytes,
            "evicted_bytes": status.evicted_bytes,
            "evicted_pages": status.evicted_pages,
            "stored_bytes": status.stored_bytes,
            "pool_bytes": status.pool_bytes,
            "metadata_bytes": status.metadata_bytes,
            "working_set_bytes": status.working_set_bytes,
            "scans": status.scans,
            "arm_seconds": status.arm_ns / 1e9,
            "harvest_seconds": status.harvest_ns / 1e9,
            "scan_interval_seconds": status.scan_interval_ns / 1e9,
            "evictions": status.evictions,
            "faults": status.faults,
            "minor_faults": status.minor_faults,
            "fault_p50_seconds": status.fault_percentile_ns(500) / 1e9,
            "fault_p99_seconds": status.fault_percentile_ns(990) / 1e9,
            "stall_seconds": status.stall_ns / 1e9,
            "checksum_errors": status.checksum_errors,
        }
    return document
