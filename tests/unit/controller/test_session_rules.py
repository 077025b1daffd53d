# SPDX-License-Identifier: Apache-2.0
"""Sequences, admission, validation and the deadband: the parts of a session that need no stream."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frostline.controller.session.admission import MAX_TRACKED_NODES, FlapGuard, TokenBucket
from frostline.controller.session.budgets import Sent, deadband_bytes, is_change, needs_push
from frostline.controller.session.sequence import Sequence, Verdict
from frostline.controller.session.validate import (
    MAX_VMS,
    InvalidError,
    check_hello,
    check_report,
    clean_detail,
    clean_identity,
    state_problem,
)
from frostline.v1 import common_pb2 as pb
from frostline.v1 import session_pb2 as wire

MIB, GIB = 1 << 20, 1 << 30


def test_sequence_in_order_gap_repeat_and_full() -> None:
    sequence = Sequence()
    assert sequence.judge(1, full=True) is Verdict.TAKE
    assert sequence.judge(2, full=False) is Verdict.TAKE
    assert sequence.judge(2, full=False) is Verdict.IGNORE
    assert sequence.judge(5, full=False) is Verdict.TAKE_AND_RESYNC
    assert sequence.judge(4, full=False) is Verdict.IGNORE
    assert sequence.judge(9, full=True) is Verdict.TAKE
    assert sequence.judge(10, full=False) is Verdict.TAKE


@given(st.lists(st.integers(0, 2**64 - 1), max_size=50))
def test_sequence_never_goes_back(numbers: list[int]) -> None:
    sequence = Sequence()
    for number in numbers:
        before = sequence.last
        verdict = sequence.judge(number, full=False)
        assert (verdict is Verdict.IGNORE) == (number <= before)
        assert sequence.last == max(before, number)


def test_token_bucket_refills_with_time() -> None:
    bucket = TokenBucket(rate_per_second=10.0, burst=3.0)
    assert [bucket.take(0.0) for _ in range(3)] == [0.0, 0.0, 0.0]
    assert bucket.take(0.0) == pytest.approx(0.1)
    assert bucket.take(0.1) == 0.0
    assert bucket.take(0.1) > 0.0
    assert [bucket.take(100.0) for _ in range(4)][3] > 0.0
    # A clock that goes back gives nothing.
    assert bucket.take(50.0) > 0.0


def test_two_agents_on_one_node_id_are_stopped() -> None:
    guard = FlapGuard(limit=5, window_seconds=30.0, block_seconds=30.0)
    # The first one finds nobody there.
    waits = [guard.admit("n", number > 0, float(number)) for number in range(9)]
    assert [wait for wait, _ in waits[:6]] == [0.0] * 6
    assert waits[6][0] == 30.0
    assert "several agents use the node id 'n'" in waits[6][1]
    assert waits[8][0] == 28.0
    assert guard.admit("other", True, 7.0) == (0.0, "")
    # After the block and the window, it may try again.
    assert guard.admit("n", True, 60.0) == (0.0, "")


def test_an_agent_that_is_restarted_often_has_more_patience() -> None:
    guard = FlapGuard(limit=5, most=15)
    waits = [guard.admit("n", False, number * 0.1) for number in range(16)]
    assert [wait for wait, _ in waits[:15]] == [0.0] * 15
    assert waits[15][0] > 0.0
    assert "connects too often" in waits[15][1]


def test_flap_guard_forgets_the_oldest_node() -> None:
    guard = FlapGuard()
    for number in range(MAX_TRACKED_NODES + 10):
        guard.admit(f"n{number}", False, 0.0)
    assert len(guard._nodes) == MAX_TRACKED_NODES


def hello(**fields: object) -> wire.Hello:
    base: dict[str, object] = {"node_id": "node-1.example", "protocol_version": 1, "agent_instance": b"0" * 16}
    return wire.Hello(**{**base, **fields})  # type: ignore[arg-type]


def test_a_good_hello() -> None:
    check_hello(hello(vms=[pb.VmIdentity(vm_id="node-1/12-34", memory_bytes=GIB)], capabilities=["from.the.future"]), 0)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"node_id": ""}, "hello.node_id"),
        ({"node_id": "a\n"}, "hello.node_id"),
        ({"node_id": "ä"}, "hello.node_id"),
        ({"protocol_version": 0}, "hello.protocol_version"),
        ({"agent_instance": b""}, "hello.agent_instance"),
        ({"boot_id": "x" * 300}, "hello.boot_id"),
        ({"agent_version": "\x1b[31m"}, "hello.agent_version"),
        ({"highest_epoch": 2**33}, "hello.highest_epoch"),
        ({"applied_version": 2**63}, "hello.applied_version"),
        ({"host_available_bytes": 1}, "hello.host_memory_bytes"),
        ({"vms": [pb.VmIdentity(vm_id="a", memory_bytes=2**60)]}, "hello.vms[0].memory_bytes"),
        ({"vms": [pb.VmIdentity(vm_id="../..", memory_bytes=1)]}, "hello.vms"),
        ({"vms": [pb.VmIdentity(vm_id=str(n), memory_bytes=1) for n in range(MAX_VMS + 1)]}, "hello.vms"),
    ],
)
def test_bad_hellos(fields: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidError) as caught:
        check_hello(hello(**fields), 0)
    assert field in dict(caught.value.problems)


def test_our_own_epoch_is_always_believed() -> None:
    check_hello(hello(highest_epoch=2**33), 2**33)


def test_a_vms_odd_name_is_made_harmless_and_costs_nobody_the_session() -> None:
    odd = pb.VmIdentity(vm_id="a", name="\x1b[2J" + "x" * 10_000, uuid="\n")
    check_hello(hello(vms=[odd]), 0)
    cleaned = clean_identity(odd)
    assert cleaned.name.startswith(" [2Jxxx")
    assert len(cleaned.name) == 256
    assert cleaned.uuid == " "
    assert odd.uuid == "\n"


def test_report_with_a_vm_that_is_gone_and_there() -> None:
    with pytest.raises(InvalidError):
        check_report(wire.Report(states=[pb.VmState(vm_id="a")], gone_vm_ids=["a"]))


def test_a_good_state_and_an_unattached_one() -> None:
    identity = pb.VmIdentity(vm_id="a", memory_bytes=GIB)
    assert state_problem(pb.VmState(vm_id="a", refusal=pb.REFUSAL_LOCKED), identity) == ""
    unscanned = pb.Histogram(
        min_age_seconds=[0, 0], resident_bytes=[0, 0], evicted_bytes=[0, 0], promotions_per_minute=[0, 0]
    )
    assert state_problem(pb.VmState(vm_id="a", histogram=unscanned), identity) == ""
    newer: Any = {"tracker": 17, "freeze_method": 9, "swapped_bytes": GIB}
    assert state_problem(pb.VmState(vm_id="a", **newer), identity) == ""
    histogram = pb.Histogram(
        min_age_seconds=[0, 10], resident_bytes=[GIB, 0], evicted_bytes=[0, GIB], promotions_per_minute=[0, 0]
    )
    assert state_problem(pb.VmState(vm_id="a", resident_bytes=GIB, histogram=histogram), identity) == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"resident_bytes": GIB + 1},
        {"evicted_bytes": 2**64 - 1},
        {"pool_bytes": 2**63},
        {"lease_remaining_seconds": float("nan")},
        {"lease_remaining_seconds": -1.0},
        {"scan_interval_seconds": float("inf")},
        {"brake_permille": 1001},
        {"refusal_detail": "x" * 1000},
        {"memory_bytes": 2**60},
        {"swapped_bytes": GIB + 1},
        {"tracker": -1},
        {"tracker": 2**31 - 1},
        {"freeze_method": 256},
    ],
)
def test_bad_states(fields: dict[str, Any]) -> None:
    identity = pb.VmIdentity(vm_id="a", memory_bytes=GIB)
    assert state_problem(pb.VmState(vm_id="a", **fields), identity) != ""


def estimated(**fields: Any) -> pb.VmState:
    base: dict[str, Any] = {
        "refusal": pb.REFUSAL_LOCKED,
        "cold_estimate_min_age_seconds": [120.0, 600.0],
        "cold_estimate_bytes": [GIB, MIB],
        "cold_estimate_looked_seconds": 14.0,
        "cold_estimate_sharers": 3,
    }
    return pb.VmState(vm_id="a", **{**base, **fields})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"cold_estimate_bytes": [GIB]}, "2 ages and 1 sizes"),
        ({"cold_estimate_min_age_seconds": []}, "0 ages and 2 sizes"),
        (
            {"cold_estimate_min_age_seconds": [float(n) for n in range(17)], "cold_estimate_bytes": [0] * 17},
            "17 ages",
        ),
        ({"cold_estimate_bytes": [GIB + 1, 0]}, "is more than its memory"),
        ({"cold_estimate_bytes": [MIB, GIB]}, "more that is older"),
        ({"cold_estimate_min_age_seconds": [120.0, float("nan")]}, "no duration"),
        ({"cold_estimate_min_age_seconds": [-1.0, 600.0]}, "no duration"),
        ({"cold_estimate_min_age_seconds": [600.0, 600.0]}, "do not grow"),
        ({"cold_estimate_looked_seconds": float("inf")}, "looked_seconds inf is no duration"),
        ({"cold_estimate_looked_seconds": -0.5}, "no duration"),
        ({"cold_estimate_sharers": 2**32 - 1}, "no number of processes"),
        ({"pager_state": pb.PAGER_STATE_ACTIVE}, "somebody is attached to"),
        ({"attached_seconds": 1.0}, "somebody is attached to"),
        ({"histogram": pb.Histogram()}, "somebody is attached to"),
        ({"cold_estimate_bytes": [], "cold_estimate_min_age_seconds": [], "cold_estimate_sharers": 2**31}, "processes"),
    ],
)
def test_estimates_that_cannot_be(fields: dict[str, Any], says: str) -> None:
    identity = pb.VmIdentity(vm_id="a", memory_bytes=GIB)
    assert state_problem(estimated(), identity) == ""
    assert says in state_problem(estimated(**fields), identity)


@given(st.lists(st.floats(), max_size=18), st.lists(st.integers(0, 2**64 - 1), max_size=18), st.floats())
@settings(max_examples=300)
def test_an_estimate_that_is_believed_makes_sense(ages: list[float], sizes: list[int], looked: float) -> None:
    state = estimated(
        cold_estimate_min_age_seconds=ages, cold_estimate_bytes=sizes, cold_estimate_looked_seconds=looked
    )
    if state_problem(state, pb.VmIdentity(vm_id="a", memory_bytes=GIB)) == "":
        assert len(ages) == len(sizes) <= 16 and looked >= 0.0
        assert ages == sorted(set(ages)) and all(0.0 <= age < 1e9 for age in ages)
        assert sizes == sorted(sizes, reverse=True) and all(size <= GIB for size in sizes)


_u64 = st.integers(0, 2**64 - 1)
_doubles = st.floats(allow_nan=True, allow_infinity=True)


@given(
    st.builds(
        pb.Histogram,
        min_age_seconds=st.lists(_doubles, max_size=5),
        resident_bytes=st.lists(_u64, max_size=5),
        evicted_bytes=st.lists(_u64, max_size=5),
        promotions_per_minute=st.lists(_doubles, max_size=5),
    ),
    _u64,
    _u64,
)
@settings(max_examples=300)
def test_what_is_believed_makes_sense(histogram: pb.Histogram, resident: int, evicted: int) -> None:
    state = pb.VmState(vm_id="a", resident_bytes=resident, evicted_bytes=evicted, histogram=histogram)
    if state_problem(state, pb.VmIdentity(vm_id="a", memory_bytes=GIB)) == "":
        assert resident <= GIB
        assert evicted <= GIB
        assert sum(histogram.resident_bytes) <= GIB
        ages = list(histogram.min_age_seconds)
        assert ages == sorted(set(ages)) or not any(ages)
        assert len(ages) == len(histogram.resident_bytes) == len(histogram.evicted_bytes)


def test_details_of_peers_are_made_harmless() -> None:
    assert clean_detail("a\x1b[31m\nb") == "a [31m b"
    assert len(clean_detail("x" * 10_000)) == 512


BASE = Sent(mode=4, bytes=GIB, rate_bytes_per_second=1, min_age_seconds=60.0, reason=pb.REASON_GRANTED)


def changed(**fields: object) -> Sent:
    return Sent(**{**{name: getattr(BASE, name) for name in Sent.__slots__}, **fields})


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        (None, BASE, True),
        (BASE, BASE, False),
        (BASE, changed(bytes=GIB + 16 * MIB), False),
        (BASE, changed(bytes=GIB - 50 * MIB), True),
        (BASE, changed(bytes=0), True),
        (changed(bytes=0), changed(bytes=1), True),
        (BASE, changed(mode=3), True),
        (BASE, changed(reason=pb.REASON_CAP), True),
        (BASE, changed(min_age_seconds=61.0), True),
        (BASE, changed(rate_bytes_per_second=2), True),
        (changed(reason=pb.REASON_FROZEN), changed(reason=pb.REASON_FROZEN, bytes=GIB - 1), True),
        (changed(reason=pb.REASON_FROZEN), changed(reason=pb.REASON_FROZEN, bytes=GIB + 1), False),
    ],
)
def test_deadband(old: Sent | None, new: Sent, counts: bool) -> None:
    assert is_change(old, new, 4 * GIB) is counts


def test_deadband_size() -> None:
    assert deadband_bytes(GIB) == 16 * MIB
    assert deadband_bytes(100 * GIB) == GIB


def test_another_set_of_vms_is_always_pushed() -> None:
    memory = {"a": GIB, "b": GIB}
    assert needs_push(None, {}, memory)
    assert not needs_push({"a": BASE}, {"a": BASE}, memory)
    assert needs_push({"a": BASE, "b": BASE}, {"a": BASE}, memory)
    assert needs_push({"a": BASE}, {"a": BASE, "b": BASE}, memory)
