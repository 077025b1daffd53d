# SPDX-License-Identifier: Apache-2.0
"""Reports: full and delta, numbered, with rates and reasons."""

from __future__ import annotations

from dataclasses import replace

import pytest

from frostline.agent.budgets import Grant
from frostline.agent.mglru import ColdEstimate
from frostline.agent.procfs import HostMemory
from frostline.agent.report import PromotionRates, ReportBuilder, holding_back, identity, vm_state
from frostline.agent.vm import Phase
from frostline.controller.session.validate import state_problem
from frostline.native import AGE_BIN_EDGES, AGE_BINS, Freeze, Refusal, State, Tracker, Why
from frostline.v1 import common_pb2, session_pb2
from tests.unit.agent.doubles import GIB, StandInVm, a_status, a_vm, as_managed

MEMORY = HostMemory(8 * GIB, 4 * GIB)


def build(builder: ReportBuilder, *vms: StandInVm, full: bool = False) -> session_pb2.Report:
    return builder.build([as_managed(vm) for vm in vms], MEMORY, full=full, traceparent="", now_unix_ns=1)


def test_the_first_report_tells_all_and_the_next_only_what_changed() -> None:
    builder = ReportBuilder(PromotionRates())
    one, two = a_vm(1, status=a_status()), a_vm(2, status=a_status())
    first = build(builder, one, two, full=True)
    assert (first.sequence, first.full, len(first.vms), len(first.states)) == (1, True, 2, 2)
    assert (first.host_memory_bytes, first.host_available_bytes) == (8 * GIB, 4 * GIB)
    assert len(build(builder, one, two).states) == 0
    two.status = a_status(evicted_pages=5)
    third = build(builder, one, two)
    assert third.sequence == 3 and [state.vm_id for state in third.states] == ["id-2"] and not third.vms
    assert third.states[0].evicted_bytes == 5 * 4096


def test_time_alone_is_no_change() -> None:
    builder = ReportBuilder(PromotionRates())
    status = a_status(attached_at_ns=1, budget_lease_until_ns=2**62)
    vm = a_vm(1, status=status)
    build(builder, vm, full=True)
    vm.status = replace(status, now_ns=status.now_ns + 10**10)
    assert not build(builder, vm).states


def test_vms_that_went_or_changed_their_id_are_gone() -> None:
    builder = ReportBuilder(PromotionRates())
    one, two = a_vm(1), a_vm(2)
    build(builder, one, two, full=True)
    one.phase = Phase.GONE
    two.vm_id = "node/102-1002"
    report = build(builder, one, two)
    assert sorted(report.gone_vm_ids) == ["id-1", "id-2"]
    assert [vm.vm_id for vm in report.vms] == ["node/102-1002"]


def test_a_refused_vm_is_reported_with_code_and_sentence() -> None:
    vm = a_vm(1, phase=Phase.REFUSED, refusal=Refusal.NOT_SHARED_MEMFD, refusal_detail="start it with share=on")
    state = vm_state(as_managed(vm), ())
    assert state.refusal == common_pb2.REFUSAL_NOT_SHARED_MEMFD
    assert state.refusal_detail == "start it with share=on"
    assert state.holding_back == common_pb2.REASON_UNSAFE and state.pager_state == 0


def test_what_looks_cold_of_a_vm_that_nobody_is_attached_to_is_an_estimate_of_its_own() -> None:
    estimate = ColdEstimate((GIB // 2, GIB // 4, 4096, 0), 14.0, 3)
    vm = a_vm(1, phase=Phase.REFUSED, refusal=Refusal.LOCKED, cold_estimate=estimate)
    state = vm_state(as_managed(vm), ())
    assert list(state.cold_estimate_min_age_seconds) == [120.0, 600.0, 3600.0, 21600.0]
    assert list(state.cold_estimate_bytes) == [GIB // 2, GIB // 4, 4096, 0]
    assert (state.cold_estimate_looked_seconds, state.cold_estimate_sharers) == (14.0, 3)
    assert not state.HasField("histogram") and state.working_set_bytes == state.evicted_bytes == 0
    assert state_problem(state, identity(as_managed(vm))) == ""
    # Time alone is no change, and whoever is attached knows better.
    builder = ReportBuilder(PromotionRates())
    build(builder, vm, full=True)
    vm.cold_estimate = replace(estimate, looked_seconds=74.0)
    assert not build(builder, vm).states
    vm.cold_estimate = replace(estimate, cold_bytes=(0, 0, 0, 0))
    assert list(build(builder, vm).states[0].cold_estimate_bytes) == [0, 0, 0, 0]
    attached = vm_state(as_managed(a_vm(1, status=a_status(), cold_estimate=estimate)), (0.0,) * AGE_BINS)
    assert not attached.cold_estimate_bytes and not attached.cold_estimate_looked_seconds


def test_ages_are_seconds_and_lists_have_one_length() -> None:
    state = vm_state(as_managed(a_vm(1, status=a_status())), (0.0,) * AGE_BINS)
    histogram = state.histogram
    assert list(histogram.min_age_seconds) == [edge * 5.0 for edge in AGE_BIN_EDGES]
    lengths = {len(histogram.min_age_seconds), len(histogram.resident_bytes), len(histogram.promotions_per_minute)}
    assert lengths == {AGE_BINS}


def test_a_budget_without_a_lease_is_not_effective() -> None:
    status = a_status(budget_bytes=GIB, budget_generation=7)
    state = vm_state(as_managed(a_vm(1, status=status)), ())
    assert (state.effective_budget_bytes, state.effective_version, state.lease_remaining_seconds) == (0, 7, 0)
    leased = replace(status, budget_lease_until_ns=status.now_ns + 30 * 10**9)
    state = vm_state(as_managed(a_vm(1, status=leased)), ())
    assert state.effective_budget_bytes == GIB and state.lease_remaining_seconds == pytest.approx(30.0)


def test_a_dead_pager_has_no_state() -> None:
    state = vm_state(as_managed(a_vm(1, status=a_status(pager_alive=False))), ())
    assert state.pager_state == common_pb2.PAGER_STATE_UNSPECIFIED and state.pager_pid == 0
    corrupt = vm_state(as_managed(a_vm(1, status=a_status(state=State.CORRUPT))), ())
    assert corrupt.pager_state == common_pb2.PAGER_STATE_CORRUPT


def test_how_accesses_are_seen_and_what_it_costs_is_reported() -> None:
    status = a_status(
        tracker=Tracker.RWP,
        tracker_grain=1,
        freeze=Freeze.RWP,
        tracker_switches=2,
        minor_faults=3,
        arm_ns=4,
        harvest_ns=5,
        swapped_bytes=6 * 4096,
    )
    state = vm_state(as_managed(a_vm(1, status=status)), ())
    assert (state.tracker, state.freeze_method) == (common_pb2.TRACKER_RWP, common_pb2.FREEZE_METHOD_RWP)
    assert state.tracker_grain_pages == 1
    assert state.swapped_bytes == 6 * 4096
    counters = state.counters
    assert (counters.tracker_switches, counters.minor_faults, counters.arm_ns, counters.harvest_ns) == (2, 3, 4, 5)
    for tracker in Tracker:
        for freeze in Freeze:
            state = vm_state(as_managed(a_vm(1, status=a_status(tracker=tracker, freeze=freeze))), ())
            assert (state.tracker, state.freeze_method) == (int(tracker), int(freeze))
    assert vm_state(as_managed(a_vm(1)), ()).tracker == common_pb2.TRACKER_UNSPECIFIED


def test_every_why_has_a_reason_and_the_grants_own_reason_explains_a_used_up_budget() -> None:
    vm = a_vm(1)
    for why in Why:
        assert holding_back(as_managed(vm), a_status(why=why)) != common_pb2.REASON_UNSPECIFIED
    vm.grant = Grant(common_pb2.MODE_ENFORCE, True, 1, 0, 1.0, common_pb2.REASON_FLOOR, "")
    assert holding_back(as_managed(vm), a_status(why=Why.BUDGET)) == common_pb2.REASON_FLOOR
    vm.grant = replace(vm.grant, reason=common_pb2.REASON_GRANTED)
    assert holding_back(as_managed(vm), a_status(why=Why.BUDGET)) == common_pb2.REASON_CAP


def test_promotions_are_rates_over_whole_scans() -> None:
    rates = PromotionRates()
    process = a_vm(1).vmm.process
    base = a_status(attached_at_ns=0, last_scan_ns=60 * 10**9, promotions=(120, *(0,) * (AGE_BINS - 1)))
    assert rates.update(process, base)[0] == pytest.approx(120.0)
    assert rates.update(process, replace(base, promotions=(999, *(0,) * (AGE_BINS - 1))))[0] == pytest.approx(120.0)
    later = replace(base, last_scan_ns=90 * 10**9, promotions=(150, *(0,) * (AGE_BINS - 1)))
    assert rates.update(process, later)[0] == pytest.approx(60.0)


def test_a_short_period_waits_and_a_new_vault_starts_over() -> None:
    rates = PromotionRates()
    process = a_vm(1).vmm.process
    rates.min_period_seconds = 30.0
    base = a_status(attached_at_ns=0, last_scan_ns=60 * 10**9, promotions=(60,) * AGE_BINS)
    rates.update(process, base)
    soon = replace(base, last_scan_ns=65 * 10**9, promotions=(6000,) * AGE_BINS)
    assert rates.update(process, soon)[0] == pytest.approx(60.0)
    anew = a_status(attached_at_ns=100 * 10**9, last_scan_ns=160 * 10**9, promotions=(6,) * AGE_BINS)
    assert rates.update(process, anew)[0] == pytest.approx(6.0)
