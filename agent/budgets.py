# SPDX-License-Identifier: Apache-2.0
"""Judges a budget set: what of it may be applied to which VM, and what is answered. Pure: no clock, no I/O.

A set that is refused whole changes nothing. Of a set that is taken, a VM whose budget makes no sense has no leave
to evict, like one that is absent: the newest set is the only authority there is.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from frostline.agent.limits import Limits
from frostline.v1 import common_pb2, session_pb2
from frostline.wire.units import format_size

# The longest that an authorisation to evict may live without its author.
MAX_LEASE_SECONDS: Final = 600.0
# Clocks of controller and host may disagree; only a set older than its lease by more than this is stale.
CLOCK_TOLERANCE_SECONDS: Final = 300.0
MAX_BUDGETS: Final = 4096
MAX_MIN_AGE_SECONDS: Final = 10 * 365 * 86400.0
# Scans are never exactly as long as planned; the policy counts a page as cold with the same tolerance.
AGE_TOLERANCE: Final = 0.99

Reason = common_pb2.Reason
Mode = common_pb2.Mode


@dataclass(frozen=True, slots=True)
class VmFacts:
    """What judging needs to know of a VM. ``refusal_detail`` is empty when nothing speaks against serving it;
    ``foreign``: another agent's pager serves it; ``held``: drained or detached by hand on this host."""

    vm_id: str
    uuid: str
    name: str
    memory_bytes: int
    refusal_detail: str = ""
    foreign: bool = False
    held: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return (self.vm_id, self.uuid, self.name)


@dataclass(frozen=True, slots=True)
class Grant:
    """What a VM may have away: absolute guest bytes, after local limits. ``attach`` False: leave the VM alone."""

    mode: common_pb2.Mode.ValueType
    attach: bool
    bytes: int
    rate_bytes_per_second: int
    min_age_seconds: float
    reason: common_pb2.Reason.ValueType
    sentence: str


@dataclass(frozen=True, slots=True)
class Judgement:
    """The answer to a set, and for each VM that it names and we have, what to do."""

    applied: bool
    reason: common_pb2.Reason.ValueType
    detail: str
    lease_seconds: float
    grants: Mapping[str, Grant]
    results: Mapping[str, session_pb2.VmBudgetResult]


def judge(
    budget_set: session_pb2.BudgetSet,
    vms: Mapping[str, VmFacts],
    limits: Limits,
    *,
    highest_epoch: int,
    last_version: int,
    now_unix_ns: int,
) -> Judgement:
    """``last_version``: of the newest set of the same epoch on this stream, 0 for none."""
    refused = _refuse_whole(budget_set, highest_epoch, last_version, now_unix_ns)
    if refused is not None:
        return refused
    grants: dict[str, Grant] = {}
    results: dict[str, session_pb2.VmBudgetResult] = {}
    times = Counter(budget.vm_id for budget in budget_set.budgets)
    for budget in budget_set.budgets:
        if budget.vm_id in results:
            continue
        facts = vms.get(budget.vm_id)
        if facts is None:
            results[budget.vm_id] = _nack(budget.vm_id, Reason.REASON_UNKNOWN_VM, "this agent has no VM with that id")
            continue
        grants[budget.vm_id], results[budget.vm_id] = _judge_vm(budget, times[budget.vm_id], facts, limits)
    lease = min(budget_set.lease_seconds, MAX_LEASE_SECONDS)
    detail = f"lease cut to {MAX_LEASE_SECONDS:.0f} s" if lease < budget_set.lease_seconds else ""
    return Judgement(True, Reason.REASON_GRANTED, detail, lease, grants, results)


def min_age_ns(min_age_seconds: float) -> int:
    """The age for a pager, which counts in scans and rounds up, less the tolerance."""
    return int(min(min_age_seconds, MAX_MIN_AGE_SECONDS) * AGE_TOLERANCE * 1e9)


def _refuse_whole(
    budget_set: session_pb2.BudgetSet, highest_epoch: int, last_version: int, now_unix_ns: int
) -> Judgement | None:
    lease = budget_set.lease_seconds
    if budget_set.epoch < highest_epoch:
        return _refuse(
            Reason.REASON_EPOCH,
            f"epoch {budget_set.epoch} is below {highest_epoch}, the highest that this agent has seen: "
            "another controller has taken over since",
        )
    if not math.isfinite(lease):
        return _refuse(Reason.REASON_INVALID, f"a lease of {lease} seconds is no lease")
    if lease <= 0:
        return _refuse(Reason.REASON_EXPIRED, f"the lease of {lease:g} s had run out on arrival")
    age_seconds = (now_unix_ns - budget_set.issued_at_unix_ns) / 1e9
    if budget_set.issued_at_unix_ns and age_seconds > lease + CLOCK_TOLERANCE_SECONDS:
        return _refuse(
            Reason.REASON_EXPIRED,
            f"the set was issued {age_seconds:.0f} s ago with a lease of {lease:g} s; "
            "if it was not, the clocks of controller and host disagree",
        )
    if budget_set.version < last_version:
        return _refuse(
            Reason.REASON_INVALID, f"version {budget_set.version} came after version {last_version} of the same epoch"
        )
    if len(budget_set.budgets) > MAX_BUDGETS:
        return _refuse(
            Reason.REASON_INVALID, f"{len(budget_set.budgets)} budgets in one set; at most {MAX_BUDGETS} are taken"
        )
    return None


def _judge_vm(
    budget: session_pb2.Budget, times: int, facts: VmFacts, limits: Limits
) -> tuple[Grant, session_pb2.VmBudgetResult]:
    problem = _nonsense(budget, times, facts)
    off = budget.mode == Mode.MODE_OFF or budget.reason == Reason.REASON_EXCLUDED
    if problem:
        # Whatever else is wrong with it: what shall be left alone is not attached to for that.
        mode = Mode.MODE_OFF if off else Mode.MODE_OBSERVE
        grant = Grant(mode, not off, 0, 0, 0.0, Reason.REASON_INVALID, problem)
        return grant, _nack(facts.vm_id, Reason.REASON_INVALID, problem)
    if limits.denied(facts.names):
        sentence = f"denied in {limits.source}"
        grant = Grant(budget.mode, False, 0, 0, 0.0, Reason.REASON_LIMITED_LOCALLY, sentence)
        return grant, _nack(facts.vm_id, Reason.REASON_LIMITED_LOCALLY, sentence)
    if off:
        reason = budget.reason or Reason.REASON_MODE
        grant = Grant(Mode.MODE_OFF, False, 0, 0, 0.0, reason, "the policy keeps it off")
        return grant, _ack(facts.vm_id, reason, "not attached", 0)
    if budget.mode != Mode.MODE_ENFORCE:
        grant = Grant(budget.mode, True, 0, 0, budget.min_age_seconds, Reason.REASON_MODE, "watched, nothing evicted")
        return grant, _result_of(grant, facts)
    verdict = limits.judge(facts.names, facts.memory_bytes, budget.bytes, budget.rate_bytes_per_second)
    reason = Reason.REASON_LIMITED_LOCALLY if verdict.sentence else (budget.reason or Reason.REASON_GRANTED)
    sentence = verdict.sentence or f"{format_size(verdict.bytes)} may be away"
    grant = Grant(
        budget.mode, True, verdict.bytes, verdict.rate_bytes_per_second, budget.min_age_seconds, reason, sentence
    )
    return grant, _result_of(grant, facts)


def _result_of(grant: Grant, facts: VmFacts) -> session_pb2.VmBudgetResult:
    if facts.held:
        return _nack(facts.vm_id, Reason.REASON_LIMITED_LOCALLY, f"an operator on the host keeps it {facts.held}")
    if facts.refusal_detail:
        return _nack(facts.vm_id, Reason.REASON_UNSAFE, facts.refusal_detail)
    if facts.foreign:
        return _nack(facts.vm_id, Reason.REASON_PAGER, "the VM is served by another agent's pager")
    return _ack(facts.vm_id, grant.reason, grant.sentence, grant.bytes)


def _nonsense(budget: session_pb2.Budget, times: int, facts: VmFacts) -> str:
    if times > 1:
        return f"the set names this VM {times} times"
    if budget.mode not in (Mode.MODE_OFF, Mode.MODE_OBSERVE, Mode.MODE_PLAN, Mode.MODE_ENFORCE):
        return f"mode {budget.mode} is not known"
    age = budget.min_age_seconds
    if not math.isfinite(age) or not 0 <= age <= MAX_MIN_AGE_SECONDS:
        return f"a minimum age of {age} seconds makes no sense"
    if budget.bytes > facts.memory_bytes > 0:
        return f"{format_size(budget.bytes)} is more than the VM's {format_size(facts.memory_bytes)}"
    return ""


def _refuse(reason: common_pb2.Reason.ValueType, detail: str) -> Judgement:
    return Judgement(False, reason, detail, 0.0, {}, {})


def _ack(vm_id: str, reason: common_pb2.Reason.ValueType, detail: str, effective: int) -> session_pb2.VmBudgetResult:
    return session_pb2.VmBudgetResult(
        vm_id=vm_id, accepted=True, reason=reason, detail=detail, effective_bytes=effective
    )


def _nack(vm_id: str, reason: common_pb2.Reason.ValueType, detail: str) -> session_pb2.VmBudgetResult:
    return session_pb2.VmBudgetResult(vm_id=vm_id, accepted=False, reason=reason, detail=detail)
