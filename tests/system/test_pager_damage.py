# SPDX-License-Identifier: Apache-2.0
"""Pagers that die, VMMs that die, and vaults that are damaged: pages wait or are lost openly, and never turn wrong."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frostline.native import CommandKind, NativeError, PagerExit, Refusal, State, View, Why, inspect
from tests.conftest import GuestFactory
from tests.system.guest import Guest, GuestConfig, GuestError, Workload
from tests.system.pager_rig import MIB, PagerRig, brief, descriptors

OPTIONS = ("--scan-interval-ms", "300", "--stall-target-permille", "1000")
CONFIG = GuestConfig(name="damaged", memory_mib=224, workload=Workload(mib=112, hot_mib=4, rate=50))
VAULT_LINK = "/memfd:frostline-vault (deleted)"
VERSION_OFFSET = 8  # of struct fl_vault_header
pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def guest(guest_factory: GuestFactory) -> Guest:
    started = guest_factory(CONFIG)
    started.wait_filled()
    return started


@pytest.fixture
def rig(guest: Guest, tmp_path: Path) -> Iterator[PagerRig]:
    with PagerRig(guest, tmp_path / "pager", *OPTIONS) as pager:
        yield pager.start()


def open_vault(guest: Guest) -> int:
    """The vault, as root finds it in the VMM; writable."""
    for entry in os.scandir(f"/proc/{guest.pid}/fd"):
        if os.readlink(entry.path) == VAULT_LINK:
            return os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
    raise AssertionError(f"no vault in process {guest.pid}")


def largest_extent(descriptor: int) -> tuple[int, int]:
    """Where most of the data is: the pool."""
    best = (0, 0)
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            assert error.errno == errno.ENXIO, error
            return best
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        best = max(best, (start, end), key=lambda extent: extent[1] - extent[0])


def test_killed_again_and_again_under_writers(guest: Guest, rig: PagerRig) -> None:
    guest.command("writers 2")
    rig.budget(100, min_age=1)
    rig.until("half of it away", lambda s: s.evicted_bytes >= 50 * MIB)
    dice = random.Random(7)
    for kill in range(1, 13):
        time.sleep(dice.uniform(0.0, 0.4))
        rig.kill()
        time.sleep(dice.uniform(0.0, 0.1))  # vCPUs run into faults that nobody reads
        rig.start()
        after = rig.status()
        assert after.takeovers == kill and after.checksum_errors == 0, brief(after)
        assert after.budget_bytes == 100 * MIB, "the lease goes on across pagers"
    assert guest.verify() == 0, guest.describe()
    guest.command("writers 0")
    rig.detach()
    assert guest.verify() == 0, guest.describe()


def test_vcpus_wait_for_the_next_pager(guest: Guest, rig: PagerRig) -> None:
    rig.evict(90)
    rig.kill()
    guest.command("rate 2000")
    time.sleep(3.0)
    stuck = guest.status().checked_pages
    time.sleep(1.0)
    assert guest.status().checked_pages - stuck < 1000, "pages that nobody serves were read"
    assert guest.status().errors == 0
    assert not rig.status().pager_alive
    rig.start()
    guest.wait_status(lambda status: status.checked_pages > stuck + 1500, 30, "the waiting threads to go on")
    assert guest.verify() == 0, guest.describe()


def test_a_polite_release_hands_over(guest: Guest, rig: PagerRig) -> None:
    before = rig.evict(90)
    rig.done(CommandKind.RELEASE)
    assert rig.wait_exit() == PagerExit.OK
    left = rig.status()
    assert left.state is State.RELEASED and not left.pager_alive and left.evicted_pages > before.evicted_pages // 2
    rig.start()
    after = rig.status()
    assert after.takeovers == 1 and after.recovered_pages == 0 and after.evicted_bytes > 60 * MIB, brief(after)
    assert guest.verify() == 0, guest.describe()


def test_sigterm_is_a_polite_release(guest: Guest, rig: PagerRig) -> None:
    rig.evict(60)
    assert rig.process is not None
    rig.process.send_signal(signal.SIGTERM)
    assert rig.wait_exit() == PagerExit.OK
    assert rig.status().state is State.RELEASED
    rig.start()
    assert guest.verify() == 0, guest.describe()


def test_a_vmm_that_dies_in_the_middle_of_an_eviction(guest: Guest, rig: PagerRig) -> None:
    rig.budget(100, min_age=1, rate_mib=24)
    rig.until("eviction under way", lambda s: 10 * MIB < s.evicted_bytes < 90 * MIB)
    guest.kill()
    died = time.monotonic()
    assert rig.wait_exit(10) == PagerExit.VM_GONE, rig.words()
    assert time.monotonic() - died < 2.0
    assert not Path(rig.socket).exists()
    assert not rig.entries("page_corrupt")
    with pytest.raises(NativeError):
        View(guest.pid)


def test_flipped_bits_in_the_pool_poison_pages_and_never_change_one(guest: Guest, rig: PagerRig) -> None:
    guest.command("rate 0")
    rig.evict(90)
    rig.budget(0, lease=0)
    before = rig.until("eviction at rest", lambda s: s.state is State.HOLD)
    vault = open_vault(guest)
    start, end = largest_extent(vault)
    assert end - start > 8 * MIB, "the pool"
    dice = random.Random(11)
    for offset in range(start, end, 1024):
        at = min(end - 1, offset + dice.randrange(1024))
        byte = os.pread(vault, 1, at)[0]
        os.pwrite(vault, bytes([byte ^ 1 << dice.randrange(8)]), at)
    os.close(vault)
    with contextlib.suppress(GuestError):  # what its kernel touched by itself may have ended it already
        guest.command("rate 1000")
    after = rig.until(
        "a page found damaged, and said", lambda s: s.checksum_errors >= 1 and bool(rig.entries("page_corrupt")), 30
    )
    assert after.evictions == before.evictions, rig.words()
    # A VMM that cannot pass a hardware error on to its guest ends by it (QEMU's TCG), which is no wrong byte.
    time.sleep(1.0)
    try:
        rig.budget(100, min_age=1)  # leave to evict everything: it must not be taken
        time.sleep(2.0)
        after = rig.status()
    except NativeError:
        assert rig.wait_exit(10) == PagerExit.VM_GONE
    else:
        assert (after.state, after.why) == (State.CORRUPT, Why.CORRUPT), brief(after)
        assert after.evictions == before.evictions and after.poisoned_pages >= 1, brief(after)
    assert guest.status().errors == 0, guest.describe()


def test_a_vault_of_another_version_is_refused_and_the_right_pager_serves_on(guest: Guest, rig: PagerRig) -> None:
    rig.evict(90)
    rig.kill()
    vault = open_vault(guest)
    version = os.pread(vault, 4, VERSION_OFFSET)
    os.pwrite(vault, struct.pack("<I", struct.unpack("<I", version)[0] + 1), VERSION_OFFSET)
    before = descriptors(guest.pid)
    assert Refusal(rig.refused()) is Refusal.VAULT_INVALID, rig.words()
    said = str(rig.entries("refused_because")[-1])
    assert "version" in said, said
    assert descriptors(guest.pid) == before and inspect(guest.pid).has_vault
    os.pwrite(vault, version, VERSION_OFFSET)
    os.close(vault)
    rig.start()
    assert guest.verify() == 0, guest.describe()
    rig.detach()
    assert guest.verify() == 0, guest.describe()


def test_a_vault_cannot_be_cut_off_or_grown(guest: Guest, rig: PagerRig) -> None:
    rig.evict(60)
    vault = open_vault(guest)
    size = os.fstat(vault).st_size
    for wrong in (0, size // 2, size * 2):
        with pytest.raises(PermissionError):
            os.truncate(vault, wrong)
    os.close(vault)
    assert guest.verify() == 0, guest.describe()


def test_a_frozen_guest_is_served_when_it_goes_on(guest: Guest, rig: PagerRig) -> None:
    """SIGSTOP to QEMU while pages go: nothing waits for it, nothing is lost."""
    os.kill(guest.pid, signal.SIGSTOP)
    try:
        rig.budget(100, min_age=1)
        time.sleep(2.0)
        assert rig.call(CommandKind.PING).pager_pid == rig.status().pager_pid
    finally:
        os.kill(guest.pid, signal.SIGCONT)
    try:
        assert guest.verify() == 0, guest.describe()
    except GuestError as error:
        raise AssertionError(f"the guest does not go on: {error}; {brief(rig.status())}") from error
