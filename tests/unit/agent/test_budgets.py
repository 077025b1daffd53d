# SPDX-License-Identifier: Apache-2.0
"""Judging budget sets: fences, leases, nonsense, local limits."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.agent.budgets import MAX_LEASE_SECONDS, Judgement, VmFacts, judge, min_age_ns
from frostline.agent.limits import Limits, parse_limits, without_file
from frostline.v1.common_pb2 import (
    MODE_ENFORCE,
    MODE_OBSERVE,
    MODE_OFF,
    MODE_PLAN,
    REASON_CAP,
    REASON_EPOCH,
    REASON_EXCLUDED,
    REASON_EXPIRED,
    REASON_GRANTED,
    REASON_INVALID,
    REASON_LIMITED_LOCALLY,
    REASON_MODE,
    REASON_PAGER,
    REASON_UNKNOWN_VM,
    REASON_UNSAFE,
    Mode,
    Reason,
)
from frostline.v1.session_pb2 import Budget, BudgetSet

GIB = 1 << 30
NOW = 1_800_000_000 * 10**9
OPEN = without_file(evict_by_default=True)
VM = VmFacts("vm-1", "", "web", GIB)


def a_set(*budgets: Budget, epoch: int = 5, version: int = 1, lease: float = 60.0, issued: int = NOW) -> BudgetSet:
    return BudgetSet(epoch=epoch, version=version, lease_seconds=lease, budgets=budgets, issued_at_unix_ns=issued)


def judged(
    budget_set: BudgetSet, *vms: VmFacts, limits: Limits = OPEN, highest_epoch: int = 5, last_version: int = 0
) -> Judgement:
    return judge(
        budget_set,
        {vm.vm_id: vm for vm in vms or (VM,)},
        limits,
        highest_epoch=highest_epoch,
        last_version=last_version,
        now_unix_ns=NOW,
    )


def enforce(size: int = GIB // 2, vm_id: str = "vm-1", min_age: float = 60.0, reason: int = REASON_GRANTED) -> Budget:
    return Budget(vm_id=vm_id, mode=MODE_ENFORCE, bytes=size, min_age_seconds=min_age, reason=Reason.ValueType(reason))


def test_a_good_set_is_taken_and_acked() -> None:
    found = judged(a_set(enforce(reason=REASON_CAP)))
    assert found.applied and found.lease_seconds == 60.0
    assert (found.grants["vm-1"].bytes, found.grants["vm-1"].reason) == (GIB // 2, REASON_CAP)
    result = found.results["vm-1"]
    assert (result.accepted, result.reason, result.effective_bytes) == (True, REASON_CAP, GIB // 2)


@pytest.mark.parametrize(
    ("budget_set", "reason", "says"),
    [
        (a_set(epoch=4), REASON_EPOCH, "below 5"),
        (a_set(lease=0.0), REASON_EXPIRED, "run out"),
        (a_set(lease=-1.0), REASON_EXPIRED, "run out"),
        (a_set(lease=math.nan), REASON_INVALID, "lease"),
        (a_set(lease=math.inf), REASON_INVALID, "lease"),
        (a_set(issued=NOW - 3600 * 10**9), REASON_EXPIRED, "clocks"),
        (a_set(version=1), REASON_INVALID, "version 1 came after version 2"),
        (a_set(*[Budget(vm_id=str(n)) for n in range(5000)], version=2), REASON_INVALID, "5000 budgets"),
    ],
)
def test_a_set_that_is_refused_whole_changes_nothing(budget_set: BudgetSet, reason: int, says: str) -> None:
    found = judged(budget_set, last_version=2 if budget_set.version == 1 and reason == REASON_INVALID else 0)
    if "version" in says:
        found = judged(budget_set, last_version=2)
    assert not found.applied and found.reason == reason and says in found.detail
    assert not found.grants and not found.results


def test_a_higher_epoch_and_a_slow_clock_are_fine() -> None:
    assert judged(a_set(enforce(), epoch=9, issued=NOW - 200 * 10**9)).applied
    assert judged(a_set(enforce(), issued=NOW + 3600 * 10**9)).applied
    assert judged(a_set(enforce(), issued=0)).applied


def test_no_lease_is_longer_than_the_limit() -> None:
    found = judged(a_set(enforce(), lease=1e9))
    assert found.lease_seconds == MAX_LEASE_SECONDS and "cut" in found.detail


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        (enforce(GIB + 1), "more than"),
        (enforce(min_age=math.nan), "minimum age"),
        (enforce(min_age=math.inf), "minimum age"),
        (enforce(min_age=-1.0), "minimum age"),
        (Budget(vm_id="vm-1", bytes=1), "mode 0"),
        (Budget(vm_id="vm-1", mode=Mode.ValueType(99), bytes=1), "mode 99"),
    ],
)
def test_nonsense_for_a_vm_is_nacked_and_leaves_it_no_leave(budget: Budget, says: str) -> None:
    other = VmFacts("vm-2", "", "db", GIB)
    found = judged(a_set(budget, enforce(vm_id="vm-2")), VM, other)
    assert found.applied and not found.results["vm-1"].accepted
    assert found.results["vm-1"].reason == REASON_INVALID and says in found.results["vm-1"].detail
    assert found.grants["vm-1"].bytes == 0 and found.grants["vm-2"].bytes == GIB // 2


def test_a_vm_named_twice_gets_nothing_and_one_answer() -> None:
    found = judged(a_set(enforce(1), enforce(2)))
    assert list(found.results) == ["vm-1"] and found.results["vm-1"].reason == REASON_INVALID
    assert found.grants["vm-1"].bytes == 0


def test_an_unknown_vm_is_nacked_alone() -> None:
    found = judged(a_set(enforce(), enforce(vm_id="ghost")))
    assert found.results["ghost"].reason == REASON_UNKNOWN_VM and not found.results["ghost"].accepted
    assert found.results["vm-1"].accepted and "ghost" not in found.grants


@pytest.mark.parametrize("mode", [MODE_OBSERVE, MODE_PLAN])
def test_watching_modes_attach_and_evict_nothing(mode: int) -> None:
    found = judged(a_set(Budget(vm_id="vm-1", mode=Mode.ValueType(mode), bytes=GIB // 2)))
    grant = found.grants["vm-1"]
    assert (grant.attach, grant.bytes, grant.reason) == (True, 0, REASON_MODE)
    assert found.results["vm-1"].accepted and found.results["vm-1"].effective_bytes == 0


@pytest.mark.parametrize(
    "budget",
    [
        Budget(vm_id="vm-1", mode=MODE_OFF, bytes=GIB // 2),
        Budget(vm_id="vm-1", mode=MODE_ENFORCE, bytes=GIB // 2, reason=REASON_EXCLUDED),
    ],
)
def test_off_and_excluded_are_not_attached_whatever_the_bytes(budget: Budget) -> None:
    grant = judged(a_set(budget)).grants["vm-1"]
    assert (grant.attach, grant.bytes, grant.mode) == (False, 0, MODE_OFF)


def test_nonsense_is_no_reason_to_attach_to_what_is_off() -> None:
    excluded = Budget(vm_id="vm-1", mode=MODE_ENFORCE, reason=REASON_EXCLUDED, min_age_seconds=math.nan)
    found = judged(a_set(excluded))
    assert not found.results["vm-1"].accepted
    assert (found.grants["vm-1"].attach, found.grants["vm-1"].mode) == (False, MODE_OFF)


def test_local_limits_cut_and_are_named() -> None:
    limits = parse_limits("version: 1\nallow_evict: true\nmax_away: 25%\n", "limits.yaml")
    result = judged(a_set(enforce()), limits=limits).results["vm-1"]
    assert (result.accepted, result.reason, result.effective_bytes) == (True, REASON_LIMITED_LOCALLY, GIB // 4)
    assert "limits.yaml" in result.detail
    closed = judged(a_set(enforce()), limits=without_file()).results["vm-1"]
    assert closed.reason == REASON_LIMITED_LOCALLY and closed.effective_bytes == 0


def test_a_denied_vm_is_never_attached() -> None:
    limits = parse_limits("version: 1\nallow_evict: true\ndenied: [web]\n", "x")
    found = judged(a_set(enforce()), limits=limits)
    assert not found.grants["vm-1"].attach and not found.results["vm-1"].accepted


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (VmFacts("vm-1", "", "web", GIB, refusal_detail="a VFIO device is open"), REASON_UNSAFE),
        (VmFacts("vm-1", "", "web", GIB, foreign=True), REASON_PAGER),
        (VmFacts("vm-1", "", "web", GIB, held="detached"), REASON_LIMITED_LOCALLY),
    ],
)
def test_a_vm_that_is_not_served_is_nacked_with_the_reason(facts: VmFacts, reason: int) -> None:
    result = judged(a_set(enforce()), facts).results["vm-1"]
    assert not result.accepted and result.reason == reason and result.detail


@given(
    size=st.integers(0, 2**64 - 1),
    rate=st.integers(0, 2**64 - 1),
    age=st.floats(),
    mode=st.integers(-3, 9),
    reason=st.integers(-3, 40),
    lease=st.floats(),
)
def test_no_set_grants_more_than_asked_or_than_there_is(
    size: int, rate: int, age: float, mode: int, reason: int, lease: float
) -> None:
    budget = Budget(
        vm_id="vm-1",
        mode=Mode.ValueType(mode),
        bytes=size,
        rate_bytes_per_second=rate,
        min_age_seconds=age,
        reason=Reason.ValueType(reason),
    )
    found = judged(a_set(budget, lease=lease))
    for grant in found.grants.values():
        assert 0 <= grant.bytes <= min(size, GIB)
        assert grant.bytes == 0 or (mode == MODE_ENFORCE and 0 <= grant.min_age_seconds < math.inf)
    assert 0 <= found.lease_seconds <= MAX_LEASE_SECONDS


@pytest.mark.parametrize(
    ("age", "interval", "scans"),
    [(60, 5, 12), (120, 7, 17), (0, 5, 0), (1, 60, 1), (2, 0.5, 4), (1e12, 1, 312_206_400)],
)
def test_ages_of_whole_scans_within_the_tolerance(age: float, interval: float, scans: int) -> None:
    assert math.ceil(min_age_ns(age) / (interval * 1e9)) == scans
