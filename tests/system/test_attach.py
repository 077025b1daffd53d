# SPDX-License-Identifier: Apache-2.0
"""Attaching to a real QEMU that goes wrong in the middle: the VM never notices, and the next pager serves it."""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from frostline.native import inspect
from tests.conftest import GuestFactory
from tests.system.guest import Guest, GuestConfig, Workload
from tests.system.pager_rig import PagerRig, brief, descriptors, shared_mappings

KILLS = 15
FILL_MIB = 96
OPTIONS = ("--scan-interval-ms", "300", "--stall-target-permille", "1000")
pytestmark = pytest.mark.timeout(300)


def facts(guest: Guest) -> tuple[dict[str, str], int]:
    """What attaching changes for a moment, and has to put back: signals, tracer, scheduling of the main thread."""
    lines = Path(f"/proc/{guest.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    wanted = ("SigBlk", "SigIgn", "SigCgt", "Seccomp", "TracerPid")
    return {name: status[name] for name in wanted}, os.sched_getscheduler(guest.pid)


def settled(guest: Guest, seconds: float = 10) -> tuple[dict[str, str], int]:
    """Facts, once a dead pager's helper has finished."""
    deadline = time.monotonic() + seconds
    while (found := facts(guest))[0]["TracerPid"].strip() != "0" or found[1] != os.SCHED_OTHER:
        assert time.monotonic() < deadline, f"somebody stays with the VMM: {found}"
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("as_nobody", [False, True], ids=["root", "nobody-sandboxed"])
def test_pagers_killed_while_they_attach(guest_factory: GuestFactory, tmp_path: Path, as_nobody: bool) -> None:
    workload = Workload(mib=FILL_MIB, hot_mib=4, rate=100)
    guest = guest_factory(
        GuestConfig(name="killed", memory_mib=224, workload=workload, run_as_nobody=as_nobody, sandbox=as_nobody)
    )
    guest.wait_filled()
    before = descriptors(guest.pid), shared_mappings(guest.pid), settled(guest)
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    moments = random.Random(seed)
    with PagerRig(guest, tmp_path / "measured", *OPTIONS) as rig:
        started = time.monotonic()
        rig.spawn()
        while not inspect(guest.pid).has_vault:
            assert time.monotonic() < started + 15, rig.words()
        until_attached = time.monotonic() - started
        rig.kill()
        settled(guest)
        rig.start()
        rig.detach()
    attached = 0
    for attempt in range(KILLS):
        with PagerRig(guest, tmp_path / str(attempt), *OPTIONS) as rig:
            rig.spawn()
            time.sleep(moments.uniform(0.3, 1.2) * until_attached)
            rig.kill()
            settled(guest)
            assert guest.alive(), guest.describe()
            if inspect(guest.pid).has_vault:
                attached += 1
                rig.start()
                rig.detach()
    print(f"{attached} of {KILLS} killed pagers had attached")
    with PagerRig(guest, tmp_path / "last", *OPTIONS) as rig:
        rig.start()
        status = rig.evict(60)
        assert status.checksum_errors == 0, brief(status)
        assert guest.verify() == 0, guest.describe()
        rig.detach()
    assert (descriptors(guest.pid), shared_mappings(guest.pid), settled(guest)) == before
    assert guest.wait_rounds(2, 20).errors == 0
