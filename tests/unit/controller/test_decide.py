# SPDX-License-Identifier: Apache-2.0
"""The decision: by example, and by what must hold for every document and every VM."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.controller.policy.decide import cold, decide
from frostline.controller.policy.document import Policy, PolicyMode, load
from frostline.controller.policy.snapshot import Bin, Flags, VmSnapshot
from frostline.v1 import common_pb2 as pb

MIB, GIB = 1 << 20, 1 << 30
ENFORCE = load("version: 1\nclasses: {standard: {mode: enforce, floor: 25%, cap: 50%, min_idle_age: 2m}}")
VM = VmSnapshot(
    vm_id="a",
    name="web",
    memory_bytes=4 * GIB,
    resident_bytes=4 * GIB,
    bins=(Bin(0, 3 * GIB), Bin(120, GIB)),
    scans=10,
    report_age_seconds=1.0,
)


def idle(cold_bytes: int, evicted_bytes: int = 0) -> VmSnapshot:
    """VM with that much cold, of which so much is away."""
    hot = VM.memory_bytes - cold_bytes
    return replace(
        VM,
        resident_bytes=VM.memory_bytes - evicted_bytes,
        evicted_bytes=evicted_bytes,
        bins=(Bin(0, hot), Bin(120, cold_bytes - evicted_bytes, evicted_bytes)),
    )


@pytest.mark.parametrize(
    ("vm", "flags", "budget", "reason"),
    [
        (idle(GIB), Flags(), GIB, pb.REASON_GRANTED),
        (idle(GIB, evicted_bytes=GIB // 2), Flags(), GIB, pb.REASON_GRANTED),
        (idle(0), Flags(), 0, pb.REASON_NOTHING_COLD),
        (idle(3 * GIB), Flags(), 2 * GIB, pb.REASON_CAP),
        (replace(VM, scans=2), Flags(), 0, pb.REASON_WARMUP),
        (replace(idle(GIB, GIB // 4), scans=2), Flags(), GIB // 4, pb.REASON_WARMUP),
        (VmSnapshot(vm_id="a", memory_bytes=GIB), Flags(), 0, pb.REASON_WARMUP),
        (replace(VM, refusal="a device is passed through to it"), Flags(), 0, pb.REASON_UNSAFE),
        (replace(idle(GIB, GIB // 2), corrupt=True), Flags(), GIB // 2, pb.REASON_CORRUPT),
        (idle(GIB, GIB // 2), Flags(fleet_frozen=True), GIB // 2, pb.REASON_FROZEN),
        (idle(GIB, GIB // 2), Flags(host_frozen=True), GIB // 2, pb.REASON_FROZEN),
        (idle(GIB, GIB // 2), Flags(vm_frozen=True), GIB // 2, pb.REASON_FROZEN),
        (idle(GIB, GIB // 2), Flags(vm_frozen=True, draining=True), 0, pb.REASON_DRAINING),
        (idle(GIB), Flags(vm_frozen=True, draining=True), 0, pb.REASON_FROZEN),
        (replace(VM, report_age_seconds=181.0), Flags(last_budget_bytes=MIB), MIB, pb.REASON_STALE),
        (replace(VM, report_age_seconds=179.0), Flags(last_budget_bytes=MIB), GIB, pb.REASON_GRANTED),
        (replace(VM, problem="garbage"), Flags(last_budget_bytes=MIB), MIB, pb.REASON_STALE),
        (replace(VM, problem="garbage"), Flags(last_budget_bytes=3 * GIB), GIB, pb.REASON_STALE),
        (replace(VM, problem="garbage", report_age_seconds=None), Flags(), 0, pb.REASON_STALE),
    ],
)
def test_reasons(vm: VmSnapshot, flags: Flags, budget: int, reason: int) -> None:
    decision = decide(ENFORCE, vm, flags)
    assert (decision.budget_bytes, decision.reason) == (budget, reason)
    assert decision.planned_bytes == budget
    assert decision.sentence.endswith(".")


def test_an_age_that_scans_cannot_tell_is_said() -> None:
    policy = load("version: 1\nclasses: {standard: {mode: enforce, min_idle_age: 1h}}")
    frequent = replace(VM, bins=(Bin(0, 0), Bin(2550, 4 * GIB)))
    decision = decide(policy, frequent, Flags())
    assert (decision.budget_bytes, decision.reason) == (0, pb.REASON_NOTHING_COLD)
    assert "idle for 1h, and ages are told up to 42m30s only" in decision.sentence
    seldom = replace(VM, bins=(Bin(0, 4 * GIB), Bin(3570, 0)))
    assert "ages are told" not in decide(policy, seldom, Flags()).sentence


def test_floor_counts_what_the_guest_filled() -> None:
    policy = load("version: 1\nclasses: {standard: {mode: enforce, floor: 1GiB, cap: 100%}}")
    vm = replace(VM, resident_bytes=GIB + 64 * MIB, bins=(Bin(0, 0), Bin(120, GIB + 64 * MIB)))
    decision = decide(policy, vm, Flags())
    assert (decision.budget_bytes, decision.reason) == (64 * MIB, pb.REASON_FLOOR)
    assert "64.0 MiB" in decision.sentence
    assert "floor" in decision.sentence


def test_plan_says_what_enforce_would_do() -> None:
    enforced = decide(ENFORCE, idle(3 * GIB), Flags())
    planned = decide(load(ENFORCE.text.replace("enforce", "plan")), idle(3 * GIB), Flags())
    assert planned.budget_bytes == 0
    assert planned.planned_bytes == enforced.budget_bytes == 2 * GIB
    assert planned.reason == pb.REASON_MODE
    assert planned.sentence.startswith("Plan only: nothing is evicted. With enforce, web may have 2.00 GiB away")


@pytest.mark.parametrize("mode", ["off", "observe"])
def test_lower_modes_plan_nothing(mode: str) -> None:
    decision = decide(load(ENFORCE.text.replace("enforce", mode)), idle(GIB), Flags())
    assert (decision.budget_bytes, decision.planned_bytes, decision.reason) == (0, 0, pb.REASON_MODE)


@pytest.mark.parametrize("key", ["a", "web", "11111111-2222"])
def test_exclusion_by_id_name_or_uuid_beats_everything(key: str) -> None:
    policy = load(f"version: 1\nvms: {{'{key}': {{exclude: true, mode: enforce}}, zz: {{}}}}")
    vm = replace(idle(GIB, GIB // 2), uuid="11111111-2222")
    decision = decide(policy, vm, Flags())
    assert (decision.mode, decision.budget_bytes, decision.reason) == (PolicyMode.OFF, 0, pb.REASON_EXCLUDED)


def test_vm_rule_beats_class_and_id_beats_name() -> None:
    policy = load(
        "version: 1\nclasses: {standard: {mode: enforce}}\n"
        "vms: {a: {cap: 512MiB}, web: {cap: 1GiB, floor: 0, class: batch, mode: enforce}}"
    )
    decision = decide(policy, idle(3 * GIB), Flags())
    assert decision.policy_class == "batch"
    assert decision.budget_bytes == 512 * MIB


def test_class_of_the_host_that_the_policy_does_not_have_is_planned_only() -> None:
    decision = decide(ENFORCE, replace(idle(GIB), vm_class="gold"), Flags())
    assert (decision.mode, decision.budget_bytes, decision.planned_bytes) == (PolicyMode.PLAN, 0, GIB)
    assert "'gold'" in decision.sentence


def test_cold_is_not_counted_twice() -> None:
    # Evicted since the scan: in the histogram still resident, in the counter already away.
    vm = replace(VM, evicted_bytes=GIB // 2, bins=(Bin(0, 3 * GIB), Bin(120, GIB, 0)))
    assert cold(vm, 120.0) == GIB
    # Faulted back since the scan.
    vm = replace(VM, evicted_bytes=GIB // 4, bins=(Bin(0, 3 * GIB), Bin(120, 0, GIB)))
    assert cold(vm, 120.0) == GIB // 4


def test_partly_cold_bin_counts_as_warm() -> None:
    vm = replace(VM, bins=(Bin(0, GIB), Bin(60, GIB), Bin(119.5, GIB), Bin(240, GIB)))
    assert cold(vm, 120.0) == 2 * GIB


_sizes = st.integers(min_value=0, max_value=8 * GIB)
_bins = st.lists(st.tuples(st.floats(0, 1e6), _sizes, _sizes).map(lambda row: Bin(*row)), max_size=6).map(tuple)
_vms = st.builds(
    VmSnapshot,
    vm_id=st.just("a"),
    name=st.sampled_from(["", "web"]),
    vm_class=st.sampled_from(["", "batch", "guaranteed", "gold"]),
    memory_bytes=_sizes,
    resident_bytes=_sizes,
    evicted_bytes=_sizes,
    bins=_bins,
    scans=st.integers(0, 10),
    refusal=st.sampled_from(["", "", "", "locked"]),
    corrupt=st.booleans(),
    report_age_seconds=st.one_of(st.none(), st.floats(0, 1000)),
    problem=st.sampled_from(["", "", "garbage"]),
)
_flags = st.builds(
    Flags,
    fleet_frozen=st.booleans(),
    vm_frozen=st.booleans(),
    draining=st.booleans(),
    last_budget_bytes=_sizes,
    report_seconds=st.floats(0.1, 600),
)
_amounts = st.one_of(st.integers(0, 8 * GIB).map(str), st.integers(0, 100).map(lambda share: f"{share}%"))


@st.composite
def _policies(draw: st.DrawFn) -> Policy:
    mode = draw(st.sampled_from(["off", "observe", "plan", "enforce"]))
    cap, floor = draw(_amounts), draw(_amounts)
    excluded = draw(st.booleans())
    vms = "vms: {a: {exclude: true}}" if excluded else ""
    # One limit is the VM's own default, so that no draw is a document with a floor above its cap.
    limit = draw(st.sampled_from([f"cap: {cap}", f"floor: {floor}"]))
    return load(f"version: 1\nclasses: {{standard: {{mode: {mode}, {limit}}}}}\n{vms}")


@given(_policies(), _vms, _flags)
@settings(max_examples=500, deadline=None)
def test_what_always_holds(policy: Policy, vm: VmSnapshot, flags: Flags) -> None:
    decision = decide(policy, vm, flags)
    away = min(vm.evicted_bytes, vm.memory_bytes)
    assert 0 <= decision.budget_bytes <= vm.memory_bytes
    assert 0 <= decision.planned_bytes <= vm.memory_bytes
    assert decision.sentence
    assert decision.reason != pb.REASON_UNSPECIFIED
    if decision.mode is not PolicyMode.ENFORCE:
        assert decision.budget_bytes == 0
    else:
        assert decision.budget_bytes == decision.planned_bytes
    if decision.reason == pb.REASON_EXCLUDED:
        assert decision.mode is PolicyMode.OFF
    if vm.refusal or vm.report_age_seconds is None:
        assert decision.budget_bytes == 0 or vm.corrupt
    # Only these may let anything new go; everything else holds or takes back.
    if decision.reason not in (pb.REASON_GRANTED, pb.REASON_CAP, pb.REASON_FLOOR, pb.REASON_STALE):
        assert decision.budget_bytes <= away
    if decision.reason == pb.REASON_STALE:
        assert decision.budget_bytes <= flags.last_budget_bytes
    if decision.reason in (pb.REASON_GRANTED, pb.REASON_CAP, pb.REASON_FLOOR):
        assert decision.budget_bytes <= decision.cold_bytes
        assert decision.budget_bytes <= decision.rule.cap.of(vm.memory_bytes)
        stays = vm.resident_bytes + vm.evicted_bytes - decision.budget_bytes
        assert decision.budget_bytes == 0 or stays >= decision.rule.floor.of(vm.memory_bytes)


@given(_policies(), _vms, _flags)
@settings(max_examples=300, deadline=None)
def test_plan_and_enforce_agree(policy: Policy, vm: VmSnapshot, flags: Flags) -> None:
    enforce = load(policy.text.replace("mode: plan", "mode: enforce"))
    one, other = decide(policy, vm, flags), decide(enforce, vm, flags)
    if one.rule.mode is PolicyMode.PLAN and other.rule.mode is PolicyMode.ENFORCE:
        assert one.planned_bytes == other.planned_bytes == other.budget_bytes or other.mode is PolicyMode.OFF
