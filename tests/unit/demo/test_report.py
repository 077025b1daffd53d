# SPDX-License-Identifier: Apache-2.0
"""The demo's verdict: what it may call a success, and what its report is made of."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.demo.report import Report
from tests.demo.sampler import Losses, VmSample

GOOD = Report(
    guest_rounds=40,
    guest_errors=0,
    guest_memory_bytes=1 << 30,
    guest_checked_pages=400_000,
    memfd_bytes_before=900 << 20,
    memfd_bytes_after=100 << 20,
    pool_bytes=250 << 20,
    metadata_bytes=2 << 20,
    evicted_pages=200_000,
    evicted_zero_pages=20_000,
    evicted_same_pages=10_000,
    evicted_ram_pages=170_000,
    faults=5_000,
    fault_p50_us=12.0,
    fault_p99_us=80.0,
    attach_stop_us=300.0,
    takeover_ms=40.0,
    killed_at_bytes=200 << 20,
    decisions=6,
    trace_id="ab" * 16,
    trace_spans=20,
    outlived_detach=True,
    excluded_lost_nothing=True,
    excluded_errors=0,
    excluded_bytes=200 << 20,
    seconds=80.0,
    accelerator="tcg",
)


def keys(document: dict[str, Any], before: str = "") -> Iterator[str]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from keys(value, f"{before}{key}.")
        else:
            yield before + key


def test_the_report_has_the_keys_that_were_promised(tmp_path: Path) -> None:
    GOOD.write(tmp_path / "report.json")
    assert set(keys(json.loads((tmp_path / "report.json").read_text()))) == {
        "guest.rounds",
        "guest.errors",
        "guest.memory_bytes",
        "memfd_bytes_before",
        "memfd_bytes_after",
        "pool_bytes",
        "evicted_pages",
        "faults.count",
        "faults.p50_us",
        "faults.p99_us",
        "attach_stop_us",
        "pager_kill.takeover_ms",
        "controller.decisions",
        "trace.id",
        "trace.spans",
    }


def test_success_is_all_four() -> None:
    assert GOOD.success
    assert GOOD.saved_share == pytest.approx(550 / 900)


@pytest.mark.parametrize(
    "wrong",
    [
        {"guest_errors": 1},
        {"guest_errors": None},
        {"guest_checked_pages": 0},
        {"memfd_bytes_after": None},
        {"memfd_bytes_before": 0},
        {"pool_bytes": 400 << 20},  # 400 of 900 MiB saved: the pool counts
        {"outlived_detach": False},
        {"excluded_lost_nothing": False},
        {"excluded_errors": 1},
        {"excluded_errors": None},
    ],
)
def test_anything_less_is_none(wrong: dict[str, Any]) -> None:
    report = dataclasses.replace(GOOD, **wrong)
    assert not report.success
    assert sum(not held for held, _, _ in report.checks()) == 1


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@pytest.mark.parametrize("report", [GOOD, Report()], ids=["good", "empty"])
def test_the_table_can_be_shown_anywhere(encoding: str, report: Report) -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding=encoding, write_through=True), width=100)
    report.show(console)
    said = raw.getvalue().decode(encoding)
    assert ("everything held" in said) == report.success
    assert ("FAILED" in said) != report.success


def test_the_excluded_vm_lost_nothing_only_if_it_never_shrank() -> None:
    losses = Losses()
    for size in (0, 100, 200, 200):
        losses.note(VmSample(memfd_bytes=size))
    assert losses.none
    losses.note(VmSample(memfd_bytes=196))
    assert not losses.none and losses.shrunk_bytes == 4
