# SPDX-License-Identifier: Apache-2.0
"""Runs the policy over a host, and tells what changed: to the log, the metrics and the journal."""

from __future__ import annotations

import json
import time
from typing import Protocol

import structlog
from opentelemetry.trace import Tracer

from frostline.controller.fleet.fleet import Fleet
from frostline.controller.fleet.records import HostRecord, VmRecord
from frostline.controller.policy.decide import decide
from frostline.controller.policy.snapshot import Decision
from frostline.controller.session.budgets import deadband_bytes
from frostline.controller.telemetry.metrics import Metrics
from frostline.v1 import common_pb2 as pb
from frostline.v1 import session_pb2 as wire

_log = structlog.get_logger(__name__)


class Journal(Protocol):
    """Where decisions and pushed budgets are kept. Must not block, and may drop."""

    def add_decision(self, fields: dict[str, str]) -> None: ...

    def put_budgets(self, node_id: str, text: str) -> None: ...


class Decider:
    """decide() for all VMs of a host, with its effects."""

    def __init__(self, fleet: Fleet, journal: Journal, metrics: Metrics, tracer: Tracer) -> None:
        self.fleet = fleet
        self.metrics = metrics
        self.tracer = tracer
        self._journal = journal

    def decide_host(self, host: HostRecord, now: float) -> dict[str, Decision]:
        """New decisions by VM id; the records hold them afterwards."""
        started = time.perf_counter()
        decisions: dict[str, Decision] = {}
        for vm_id, vm in host.vms.items():
            new = decide(self.fleet.policy, vm.snapshot(now), self.fleet.flags(host, vm))
            if self._is_news(vm, new):
                self._tell(host, vm, new)
            vm.decision = new
            decisions[vm_id] = new
        self.metrics.record("decide.duration", time.perf_counter() - started)
        return decisions

    def remember_push(self, host: HostRecord, budgets: list[wire.Budget], version: int, epoch: int) -> None:
        """Keep what a host was last told, for whoever asks after this process is gone."""
        text = json.dumps(
            {
                "version": version,
                "epoch": epoch,
                "at_unix_ns": time.time_ns(),
                "budgets": {budget.vm_id: {"mode": budget.mode, "bytes": budget.bytes} for budget in budgets},
            }
        )
        self._journal.put_budgets(host.node_id, text)

    @staticmethod
    def _is_news(vm: VmRecord, new: Decision) -> bool:
        old = vm.decision
        if old is None or (old.mode, old.reason, old.policy_class) != (new.mode, new.reason, new.policy_class):
            return True
        noise = deadband_bytes(vm.identity.memory_bytes)
        return any(
            before != after and (0 in (before, after) or abs(before - after) > noise)
            for before, after in ((old.budget_bytes, new.budget_bytes), (old.planned_bytes, new.planned_bytes))
        )

    def _tell(self, host: HostRecord, vm: VmRecord, new: Decision) -> None:
        old_bytes = vm.decision.budget_bytes if vm.decision is not None else 0
        reason = pb.Reason.Name(pb.Reason.ValueType(new.reason)).removeprefix("REASON_").lower()
        vm.decided_at_unix_ns = time.time_ns()
        self.fleet.touch(vm)
        self.metrics.count("decisions", reason=reason)
        _log.info(
            "decision",
            vm=vm.identity.name or vm.identity.vm_id,
            node_id=host.node_id,
            old_budget_bytes=old_bytes,
            new_budget_bytes=new.budget_bytes,
            planned_bytes=new.planned_bytes,
            mode=new.mode.name.lower(),
            reason=reason,
            sentence=new.sentence,
        )
        self._journal.add_decision(
            {
                "at_unix_ns": str(vm.decided_at_unix_ns),
                "node_id": host.node_id,
                "vm_id": vm.identity.vm_id,
                "name": vm.identity.name,
                "policy_version": str(self.fleet.policy.version),
                "class": new.policy_class,
                "mode": new.mode.name.lower(),
                "budget_bytes": str(new.budget_bytes),
                "planned_bytes": str(new.planned_bytes),
                "cold_bytes": str(new.cold_bytes),
                "reason": reason,
                "sentence": new.sentence,
            }
        )
