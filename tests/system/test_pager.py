# SPDX-License-Identifier: Apache-2.0
"""The pager against a real guest: pages go, come back when touched, and nobody notices but the host."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from frostline.native import PAGE_BYTES, CommandKind, Refusal, State, Why, inspect
from tests.conftest import GuestFactory, why_no_guest
from tests.system.guest import Guest, GuestConfig, Workload
from tests.system.pager_rig import MIB, PAGES_PER_MIB, PagerRig, brief, descriptors, shared_mappings

FILL_MIB = 136
# A fault a scan would brake eviction on a machine that emulates its guests: these tests are about other things.
OPTIONS = ("--scan-interval-ms", "300", "--stall-target-permille", "1000")
CALM = Workload(mib=FILL_MIB, hot_mib=4, rate=100)
# Guests boot and fill under emulation, beside whatever else this machine is doing.
pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def shared_guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One guest for tests that leave it as they found it."""
    reason = why_no_guest()
    if reason is not None:
        pytest.skip(reason)
    config = GuestConfig(name="shared", memory_mib=256, workload=CALM, balloon=True)
    with Guest(config, tmp_path_factory.mktemp("shared-guest")) as guest:
        guest.wait_filled()
        yield guest


@pytest.fixture
def guest(shared_guest: Guest) -> Iterator[Guest]:
    """The shared guest, alive before and right afterwards."""
    assert shared_guest.alive(), shared_guest.describe()
    yield shared_guest
    shared_guest.command(f"rate {CALM.rate}")
    shared_guest.command("writers 0")
    assert shared_guest.verify() == 0, shared_guest.describe()


@pytest.fixture
def rig(guest: Guest, tmp_path: Path) -> Iterator[PagerRig]:
    """A pager at the shared guest; detached at the end, unless the test did so itself."""
    with PagerRig(guest, tmp_path, *OPTIONS) as pager:
        pager.start()
        yield pager
        if pager.process is not None and pager.process.poll() is None:
            pager.detach()


def evict_and_fault_back(guest: Guest, rig: PagerRig) -> None:
    before = guest.memfd_resident_bytes()
    rig.evict(120)
    away = rig.until(  # the sum and its parts are counted one after the other, while more goes
        "the sum of what is away",
        lambda s: s.evicted_pages == s.evicted_zero_pages + s.evicted_same_pages + s.evicted_ram_pages,
    )
    assert before - guest.memfd_resident_bytes() >= 110 * MIB, brief(away)
    assert 0 < away.stored_bytes <= away.pool_bytes < away.evicted_bytes // 2
    rig.budget(0, lease=0)  # nothing goes again: what the guest reads now stays
    assert guest.verify() == 0, guest.describe()
    back = rig.status()
    assert guest.memfd_resident_bytes() >= FILL_MIB * MIB, f"every byte was read, so it is here; {brief(back)}"
    assert back.faults - away.faults >= 30 * PAGES_PER_MIB, brief(back)
    assert back.fault_percentile_ns(500) > 0 and back.checksum_errors == 0


def test_evicted_pages_come_back_byte_for_byte(guest: Guest, rig: PagerRig) -> None:
    evict_and_fault_back(guest, rig)
    assert guest.wait_rounds(2, 20).errors == 0


def test_under_writers_nothing_is_lost(guest: Guest, rig: PagerRig) -> None:
    guest.command("writers 2")
    guest.command("rate 500")
    rig.budget(FILL_MIB, min_age=1)
    rig.until("a good deal of coming and going", lambda s: s.evictions >= 40_000 and s.faults >= 2_000)
    assert guest.verify() == 0, guest.describe()


def test_it_works_on_an_unprivileged_sandboxed_qemu(guest_factory: GuestFactory, tmp_path: Path) -> None:
    config = GuestConfig(name="nobody", memory_mib=256, workload=CALM, run_as_nobody=True, sandbox=True)
    guest = guest_factory(config)
    guest.wait_filled()
    found = inspect(guest.pid)
    assert (found.refusal, found.seccomp_mode) == (Refusal.NONE, 2) and found.uid != 0, found.detail
    before = descriptors(guest.pid), shared_mappings(guest.pid)
    with PagerRig(guest, tmp_path / "pager", *OPTIONS) as rig:
        rig.start()
        evict_and_fault_back(guest, rig)
        rig.detach()
    assert (descriptors(guest.pid), shared_mappings(guest.pid)) == before
    assert guest.verify() == 0


def test_detaching_leaves_the_vmm_as_it_was(guest: Guest, tmp_path: Path) -> None:
    before = descriptors(guest.pid), shared_mappings(guest.pid)
    with PagerRig(guest, tmp_path, *OPTIONS) as rig:
        rig.start()
        during = descriptors(guest.pid)
        assert len(during) == len(before[0]) + 2, "a userfaultfd and the vault, and nothing else"
        rig.evict(60)
        rig.detach()
        assert not Path(rig.socket).exists()
    assert (descriptors(guest.pid), shared_mappings(guest.pid)) == before
    assert not inspect(guest.pid).has_vault
    assert guest.wait_rounds(2, 20).errors == 0


def test_attaching_stops_the_vmm_for_less_than_a_millisecond(guest: Guest, tmp_path: Path) -> None:
    stops = []
    for attempt in range(5):
        with PagerRig(guest, tmp_path / str(attempt), *OPTIONS) as rig:
            stops.append(rig.start().status().attach_stop_ns)
            rig.detach()
    # One noisy neighbour is not the pager's doing; being slow by nature would show every time.
    assert sorted(stops)[len(stops) // 2] < 1_000_000, stops


def test_memory_that_the_guest_gives_back_is_forgotten(guest_factory: GuestFactory, tmp_path: Path) -> None:
    # Free page reporting names pages that nobody touches on the way; a balloon's pages are zeroed by the guest first.
    config = GuestConfig(name="giving", memory_mib=256, workload=CALM, free_page_reporting=True)
    guest = guest_factory(config)
    guest.wait_filled()
    with PagerRig(guest, tmp_path / "pager", *OPTIONS) as rig:
        rig.start()
        rig.evict(100)
        guest.shrink(16)
        after = rig.until("stored copies forgotten", lambda s: s.removed_pages >= 8 * PAGES_PER_MIB, 30)
        assert after.checksum_errors == 0, brief(after)
        guest.balloon(256 - 64)
        guest.balloon(256)
        guest.grow(FILL_MIB)
        assert guest.verify() == 0, guest.describe()
        rig.kill()
        rig.start()
        assert guest.verify() == 0, guest.describe()
        rig.detach()
    assert guest.verify() == 0


def test_prefetch_brings_pages_back_ahead_of_a_touch(guest: Guest, rig: PagerRig) -> None:
    guest.command("rate 0")
    away = rig.evict(90)
    rig.budget(100, min_age=255)  # leave to be away, and nothing that old: nothing goes again
    region = inspect(guest.pid).regions[0]
    pages = region.length // PAGE_BYTES
    rig.done(CommandKind.PREFETCH, first_page=region.first_page, page_count=pages)
    wanted = away.prefetched_pages + 80 * PAGES_PER_MIB
    rig.until("all prefetched", lambda s: s.evicted_pages == 0 and s.prefetched_pages >= wanted)
    assert rig.call(CommandKind.PREFETCH, first_page=1 << 40, page_count=1).error != 0
    assert rig.call(CommandKind.PREFETCH, first_page=0, page_count=0).error != 0


def test_a_drained_vm_stays_drained_until_the_next_budget(guest: Guest, rig: PagerRig) -> None:
    before = guest.memfd_resident_bytes()
    rig.evict(90)
    rig.drain()
    # What is away is counted page by page; what was drained, and the pool, once a round of the mover, after its last.
    drained = rig.until(
        "drained, and the pool given back",
        lambda s: s.drained_pages >= 80 * PAGES_PER_MIB and s.pool_bytes <= 8 * MIB,
        10,
    )
    assert guest.memfd_resident_bytes() >= before - 8 * MIB
    time.sleep(1.5)
    still = rig.status()
    assert (still.evicted_pages, still.why) == (0, Why.DRAIN) and still.evictions == drained.evictions, brief(still)
    rig.evict(60)


def test_a_lease_that_runs_out_means_hold(guest: Guest, rig: PagerRig) -> None:
    guest.command("rate 0")
    rig.budget(100, min_age=1, lease=2.0, rate_mib=16)
    # A new pager holds as well, with nothing away, until it has a budget.
    held = rig.until("HOLD", lambda s: s.state is State.HOLD and s.why is Why.LEASE and s.evicted_pages > 0)
    assert held.evicted_bytes < 60 * MIB, brief(held)
    time.sleep(1.5)
    later = rig.status()
    assert later.evictions == held.evictions, "evicted without a lease"
    assert later.scans > held.scans, "ages must go on without a lease"
    assert later.evicted_bytes > held.evicted_bytes * 0.8, "what is away stays away"
    guest.command("rate 2000")
    faults = rig.until("faults are served", lambda s: s.faults > later.faults + 50)
    assert faults.state is State.HOLD
    rig.budget(100)
    rig.until("evicting again", lambda s: s.state is State.ACTIVE and s.evictions > held.evictions)


def test_a_smaller_budget_brings_pages_back(guest: Guest, rig: PagerRig) -> None:
    guest.command("rate 0")
    rig.evict(90)
    rig.budget(30)
    rig.until(
        "no more away than allowed",
        lambda s: s.evicted_bytes <= 30 * MIB and s.prefetched_pages >= 50 * PAGES_PER_MIB,
    )
    time.sleep(1)
    assert rig.status().evicted_bytes <= 30 * MIB
    assert rig.status().evicted_bytes >= 20 * MIB, "more came back than had to"


def test_eviction_keeps_to_its_rate(guest: Guest, rig: PagerRig) -> None:
    guest.command("rate 0")
    # Every page is old enough before the clock starts.
    rig.until("ages", lambda s: s.scans >= 4)
    started, before = time.monotonic(), rig.status().evictions
    rig.budget(100, min_age=1, rate_mib=10)
    time.sleep(4)
    moved_mib = (rig.status().evictions - before) / PAGES_PER_MIB
    seconds = time.monotonic() - started
    # One second's worth may have been saved up.
    assert 10 <= moved_mib <= 10 * (seconds + 1.5), f"{moved_mib:.1f} MiB in {seconds:.1f} s at 10 MiB/s"


def test_a_full_pool_stops_eviction_and_loses_nothing(guest: Guest, tmp_path: Path) -> None:
    with PagerRig(guest, tmp_path, *OPTIONS, "--pool-max-bytes", str(8 * MIB)) as rig:
        rig.start()
        rig.budget(100, min_age=1)
        full = rig.until("the pool full", lambda s: s.why is Why.TIER_FULL)
        assert full.pool_bytes <= 8 * MIB and full.evicted_ram_pages > 0, brief(full)
        assert full.state is State.ACTIVE
        assert guest.verify() == 0, guest.describe()
        assert rig.status().checksum_errors == 0
        rig.detach()


def test_memory_plugged_in_later_is_served_too(guest_factory: GuestFactory, tmp_path: Path) -> None:
    config = GuestConfig(name="growing", memory_mib=256, workload=CALM, hotplug_slots=2)
    guest = guest_factory(config)
    guest.wait_filled()
    with PagerRig(guest, tmp_path / "pager", *OPTIONS) as rig:
        rig.start()
        assert rig.status().memory_bytes == 256 * MIB
        guest.hotplug(256)
        rig.until("the new region", lambda s: s.memory_bytes == 512 * MIB, 20)
        guest.grow(360)
        # More than the first region ever held: pages of the second are away as well.
        rig.evict(320)
        assert guest.memfd_resident_bytes() < 160 * MIB
        assert guest.verify() == 0, guest.describe()
        rig.kill()
        rig.start()
        assert rig.status().memory_bytes == 512 * MIB, "the successor serves both regions"
        assert guest.verify() == 0, guest.describe()
        rig.detach()
    assert guest.verify() == 0


def test_two_guests_are_served_side_by_side(guest: Guest, guest_factory: GuestFactory, tmp_path: Path) -> None:
    other = guest_factory(GuestConfig(name="other", memory_mib=192, workload=Workload(mib=48, hot_mib=4, seed=9)))
    other.wait_filled()
    with ExitStack() as stack:
        rigs = [
            stack.enter_context(PagerRig(each, tmp_path / each.config.name, *OPTIONS)).start()
            for each in (guest, other)
        ]
        rigs[0].evict(60)
        rigs[1].evict(30)
        rigs[0].kill()
        faults = rigs[1].status().faults
        assert other.verify() == 0, "another VM's dead pager is no concern of this one"
        assert rigs[1].status().faults > faults
        rigs[0].start()
        for each in rigs:
            each.detach()
    assert other.verify() == 0


def test_metadata_and_the_pager_itself_are_small(guest: Guest, rig: PagerRig) -> None:
    status = rig.evict(90)
    # 0.25 %, and a fixed part that only shows on a guest as small as this one.
    assert status.metadata_bytes <= status.memory_bytes // 400 + 64 * 1024, brief(status)
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{status.pager_pid}/status").read_text().splitlines())
    kib = {name: int(fields[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem")}
    # RssShmem is the vault and guest memory, which are counted elsewhere.
    assert kib["RssAnon"] + kib["RssFile"] <= 8 * 1024, kib
