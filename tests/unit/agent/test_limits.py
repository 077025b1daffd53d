# SPDX-License-Identifier: Apache-2.0
"""The local limits file: strict, and only ever tighter."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frostline.agent.limits import LimitsError, load_limits, parse_limits, without_file
from frostline.native import Tracker

GIB = 1 << 30
NAMES = ("id-1", "uuid-1", "web")


def test_without_a_file_nothing_is_evicted_on_a_controllers_word() -> None:
    assert without_file().judge(NAMES, GIB, GIB // 2, 0).bytes == 0
    assert without_file(evict_by_default=True).judge(NAMES, GIB, GIB // 2, 0).bytes == GIB // 2


def test_a_file_that_forbids_eviction_wins_over_standalone() -> None:
    limits = parse_limits("version: 1\nallow_evict: false\n", "x", evict_by_default=True)
    verdict = limits.judge(NAMES, GIB, GIB // 2, 0)
    assert verdict.bytes == 0 and "allow_evict" in verdict.sentence


def test_each_limit_cuts_and_says_so() -> None:
    limits = parse_limits(
        "version: 1\nallow_evict: true\nmax_away: 80%\nmin_resident: 128MiB\nmax_rate: 64MiB/s\n"
        "vms:\n  web: {max_away: 25%, max_rate: 1MiB/s}\n  db: {min_resident: 1000MiB}\n",
        "limits.yaml",
    )
    web = limits.judge(NAMES, GIB, GIB, 0)
    assert (web.bytes, web.rate_bytes_per_second) == (GIB // 4, 1 << 20)
    assert "max_away in limits.yaml" in web.sentence
    db = limits.judge(("db",), GIB, GIB, 10 << 20)
    assert (db.bytes, db.rate_bytes_per_second) == (24 << 20, 10 << 20)
    assert "min_resident" in db.sentence
    other = limits.judge(("x",), GIB, GIB // 2, 0)
    assert (other.bytes, other.rate_bytes_per_second, other.sentence) == (GIB // 2, 64 << 20, "")


@given(
    memory=st.integers(0, 1 << 40),
    wanted=st.integers(0, 1 << 41),
    rate=st.integers(0, 1 << 32),
    away=st.integers(0, 100),
    kept=st.integers(0, 1 << 40),
)
def test_a_limit_never_loosens(memory: int, wanted: int, rate: int, away: int, kept: int) -> None:
    document = f"version: 1\nallow_evict: true\nmax_away: {away}%\nmin_resident: {kept}\nmax_rate: 1MiB/s\n"
    verdict = parse_limits(document, "x").judge(NAMES, memory, wanted, rate)
    assert 0 <= verdict.bytes <= min(wanted, max(0, memory - kept), memory)
    assert 0 < verdict.rate_bytes_per_second <= (rate or 1 << 20)


def test_denied_by_any_name_and_by_not_being_among_the_only_ones() -> None:
    limits = parse_limits("version: 1\ndenied: [uuid-1]\nvms:\n  db: {denied: true, class: batch}\n", "x")
    assert limits.denied(NAMES) and limits.denied(("db",)) and not limits.denied(("other", ""))
    assert limits.vm_class(("db",)) == "batch" and limits.vm_class(NAMES) == ""
    only = parse_limits("version: 1\nonly: [web]\n", "x")
    assert not only.denied(NAMES) and only.denied(("db",))
    assert parse_limits("version: 1\nonly: []\n", "x").denied(NAMES)


@pytest.mark.parametrize(
    ("document", "says"),
    [
        ("allow_evict: true\n", "version"),
        ("version: 2\n", "version"),
        ("version: 1\nmax_awya: 80%\n", "max_awya"),
        ("version: 1\nallow_evict: 1\n", "allow_evict"),
        ("version: 1\nmax_away: -1\n", "max_away"),
        ("version: 1\nmax_away: 120%\n", "max_away"),
        ("version: 1\npool_max: 0\n", "pool_max"),
        ("version: 1\npool_max: 10%\n", "pool_max"),
        ("version: 1\nfault_threads: 0\n", "fault_threads"),
        ("version: 1\nfault_threads: 17\n", "fault_threads"),
        ("version: 1\nscan_interval: 1ms\n", "scan_interval"),
        ("version: 1\nlongest_io: 61s\n", "longest_io"),
        ("version: 1\nlongest_io: soon\n", "longest_io"),
        ("version: 1\nstall_target: 200%\n", "stall_target"),
        ("version: 1\ntrackers: [zap, 2]\n", "trackers: 2 is no tracker"),
        ("version: 1\ntrackers: []\n", "trackers: the list is empty"),
        ("version: 1\ntrackers: [rwp, rwp]\n", "trackers: 'rwp' is in the list twice"),
        ("version: 1\ntrackers:\n", "trackers: None is no list"),
        ("version: 1\nvms: {a: {floor: 1}}\n", "vms.a.floor"),
        ("version: 1\nversion: 1\n", "twice"),
        ("- 1\n", "mapping"),
        ("version: [1\n", "not valid YAML"),
        ("x: " + "y" * 70000, "bytes"),
    ],
)
def test_a_bad_document_is_rejected_whole_with_the_place(document: str, says: str) -> None:
    with pytest.raises(LimitsError, match="limits file here") as caught:
        parse_limits(document, "here")
    assert says in str(caught.value)


def test_reading_files(tmp_path: Path) -> None:
    path = tmp_path / "limits.yaml"
    with pytest.raises(LimitsError, match="cannot read limits file"):
        load_limits(path)
    path.write_text("version: 1\nallow_evict: true\npool_max: 4GiB\nvm_pool_max: 1GiB\nstall_target: 2.5%\n")
    limits = load_limits(path)
    assert limits.allow_evict and limits.vm_pool_bytes() == GIB
    assert limits.document.stall_target == 25 and limits.document.trackers is None
    path.write_text("version: 1\ntrackers: [zap, rwp]\n")
    assert load_limits(path).document.trackers == (Tracker.ZAP, Tracker.RWP)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(LimitsError):
        load_limits(path)
