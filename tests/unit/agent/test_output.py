# SPDX-License-Identifier: Apache-2.0
"""The agent's tables: each number stands under its heading."""

from __future__ import annotations

import io
from dataclasses import replace

from rich.console import Console

from frostline.agent.cli.output import print_status
from frostline.agent.mglru import ColdEstimate
from frostline.agent.status import vm_document
from frostline.agent.vm import Phase
from frostline.native import Freeze, Refusal, Tracker
from tests.unit.agent.doubles import GIB, StandInVm, a_status, a_vm, as_managed

AGENT = {
    "node_id": "node-1",
    "mode": "standalone",
    "connected": None,
    "controller_id": None,
    "session_seconds": None,
    "last_error": None,
    "highest_epoch": 0,
    "applied_version": 0,
    "allow_evict": True,
    "limits": "built in",
    "pool_full": False,
}


def printed(*vms: StandInVm) -> str:
    console = Console(file=io.StringIO(), width=200)
    print_status({"agent": AGENT, "vms": [vm_document(as_managed(vm)) for vm in vms]}, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def cells(text: str, name: str) -> dict[str, str]:
    """A row of the table by its headings."""
    lines = [line for line in text.splitlines() if "┃" in line or "│" in line]
    heads = [cell.strip() for cell in lines[0].strip("┃").split("┃")]
    row = next(line for line in lines[1:] if name in line)
    return dict(zip(heads, (cell.strip() for cell in row.strip("│").split("│")), strict=True))


def test_each_number_stands_under_its_heading() -> None:
    status = a_status(tracker=Tracker.IDLE, freeze=Freeze.WP, pool_bytes=3 << 20, faults=42, budget_bytes=GIB // 4)
    leased = replace(status, budget_lease_until_ns=status.now_ns + 30 * 10**9)
    row = cells(printed(a_vm(1, status=leased)), "vm-1")
    assert (row["pool"], row["faults"], row["lease"], row["tracker"]) == ("3.00 MiB", "42", "30s", "idle")
    assert (row["memory"], row["may be away"]) == ("1.00 GiB", "256 MiB")
    assert cells(printed(a_vm(2)), "vm-2")["tracker"] == "-"


def test_ages_by_regions_are_called_an_estimate() -> None:
    status = a_status(tracker=Tracker.DAMON, tracker_grain=16)
    assert cells(printed(a_vm(1, status=status)), "vm-1")["tracker"] == "damon (estimate)"


def test_an_estimate_is_called_one_and_shown_only_while_nobody_is_attached() -> None:
    estimate = ColdEstimate((3 << 28, 1 << 20, 0, 0), 3700.0, 2)
    refused = a_vm(1, phase=Phase.REFUSED, refusal=Refusal.LOCKED, refusal_detail="locked", cold_estimate=estimate)
    text = " ".join(printed(refused).split())
    assert "vm-1: ~768 MiB cold (estimate): not seen touched for 2m, ~1.00 MiB for 10m, ~0 B for 1h" in text
    assert "the kernel looked 1h1m ago; shared with 2 other processes; an estimate for the whole cgroup" in text
    served = vm_document(as_managed(a_vm(2, status=a_status(), cold_estimate=estimate)))
    assert served["cold_estimate"] is None
