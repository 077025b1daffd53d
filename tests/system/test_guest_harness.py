# SPDX-License-Identifier: Apache-2.0
"""The guest harness itself: real guests boot, and their verifier finds what is wrong and nothing else."""

import ctypes
import ctypes.util
import os
import pwd
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.conftest import GuestFactory
from tests.system.guest import Guest, GuestConfig, GuestError, Workload
from tests.system.guest.accelerator import choose_accelerator
from tests.system.guest.config import Backend
from tests.system.guest.initramfs import Entry, newc_archive, workload_program
from tests.system.guest.memfd import overwrite

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = GuestConfig(name="small", memory_mib=192, workload=Workload(mib=64, hot_mib=4))
# Nothing is rewritten, so every page stays in the generation it was filled with.
STILL = Workload(mib=64, hot_mib=4, rate=0, hot_write_percent=0)
pytestmark = pytest.mark.timeout(300)


def dumped(pages: int, *settings: str, generation: int = 1) -> bytes:
    command = [str(workload_program()), "--dump", "0", str(pages), str(generation), *settings]
    return subprocess.run(command, stdout=subprocess.PIPE, timeout=30, check=True).stdout


@cache
def lz4() -> ctypes.CDLL:
    name = ctypes.util.find_library("lz4")
    if name is None:
        pytest.skip("liblz4 is not there: install liblz4-1")
    return ctypes.CDLL(name)


def lz4_bytes(page: bytes) -> int:
    room = ctypes.create_string_buffer(2 * len(page))
    return int(lz4().LZ4_compress_default(page, room, len(page), len(room)))


def test_compressible_pages_are_about_three_to_one_under_lz4() -> None:
    content = dumped(200, "zero_percent=0", "same_percent=0", "random_percent=0")
    sizes = [lz4_bytes(content[at : at + 4096]) for at in range(0, len(content), 4096)]
    assert 2.6 <= 4096 * len(sizes) / sum(sizes) <= 3.4


def test_kinds_come_in_the_shares_asked_for_and_contents_differ() -> None:
    content = dumped(4000, "zero_percent=20", "same_percent=10", "random_percent=30")
    pages = [content[at : at + 4096] for at in range(0, len(content), 4096)]
    zero = sum(page == bytes(4096) for page in pages)
    same = sum(page == page[:4] * 1024 for page in pages) - zero
    random = sum(lz4_bytes(page) > 4000 for page in pages)
    assert 700 <= zero <= 900 and 330 <= same <= 470 and 1100 <= random <= 1300
    assert len(set(pages)) == len(pages) - zero + 1
    assert dumped(1, "zero_percent=0") != dumped(1, "zero_percent=0", generation=2)
    assert dumped(1, "zero_percent=0", "seed=7") != dumped(1, "zero_percent=0", "seed=8")


def test_archive_is_read_back_by_cpio_alike(tmp_path: Path) -> None:
    entries = [Entry("folder", 0o040755), Entry("folder/file", 0o100640, b"seven b")]
    done = subprocess.run(["cpio", "-i", "--quiet"], input=newc_archive(entries), cwd=tmp_path, timeout=10, check=False)
    assert done.returncode == 0
    assert (tmp_path / "folder" / "file").read_bytes() == b"seven b"
    assert (tmp_path / "folder" / "file").stat().st_mode == 0o100640


def test_guest_fills_runs_and_verifies_without_error(guest_factory: GuestFactory) -> None:
    guest = guest_factory(SMALL)
    guest.wait_booted()
    filled = guest.wait_filled()
    assert filled.filled_bytes == 64 << 20
    assert 64 << 20 <= guest.memfd_resident_bytes() <= 192 << 20
    guest.command("rate 2000")
    guest.command("writers 2")
    before = guest.wait_status(lambda status: status.writers == 2, 10, "writers")
    after = guest.wait_rounds(2, 30)
    assert after.checked_pages - before.checked_pages >= 1000
    assert after.writes > before.writes
    assert guest.verify() == 0
    assert guest.status().checked_pages - after.checked_pages >= filled.filled_pages
    assert guest.grow(80).filled_bytes == 80 << 20
    assert guest.shrink(32).filled_bytes == 32 << 20
    assert guest.verify() == 0
    guest.shutdown()
    assert not guest.alive()
    assert guest.events("poweroff")


def test_refused_commands_are_told(guest_factory: GuestFactory) -> None:
    guest = guest_factory(SMALL)
    guest.wait_filled()
    for line in ("nonsense 1", "rate many", "seed 5", "writers 99"):
        guest.command(line)
    console_says = [event["text"] for event in wait_events(guest, "refused", 4)]
    assert console_says == [
        "nonsense: no such command or setting",
        "rate: not a whole number",
        "seed: can be set at boot only",
        "writers: out of range",
    ]
    with pytest.raises(GuestError, match="no answer where page"):
        guest.where(1 << 20)


def wait_events(guest: Guest, kind: str, count: int) -> list[dict[str, object]]:
    deadline = time.monotonic() + 10
    while len(guest.events(kind)) < count and time.monotonic() < deadline:
        time.sleep(0.05)
    return guest.events(kind)


class Damage(NamedTuple):
    page: int
    generation: int
    at: int
    content: bytes
    looks_like: str


def is_structured(content: bytes) -> bool:
    return len(set(content)) > 16


def unlike_others(guest: Guest, first: int) -> int:
    """A page, as filled, whose content is nowhere else in the guest."""
    return next(page for page in range(first, first + 100) if is_structured(guest.page_content(page)))


def first_rewritten(guest: Guest) -> tuple[int, int]:
    """A page of the hot set, with its generation, that differs from the one before, both found nowhere else."""
    for page in range(100):
        generation = guest.where(page).generation
        if generation > 1 and all(is_structured(guest.page_content(page, generation - back)) for back in (0, 1)):
            return page, generation
    raise AssertionError("no page was rewritten")


@pytest.fixture
def still_guest(guest_factory: GuestFactory) -> Guest:
    """A guest in which nothing is written any more, after some pages of the hot set were."""
    guest = guest_factory(GuestConfig(name="still", memory_mib=192, workload=STILL))
    guest.wait_filled()
    guest.command("hot_write_percent 100")
    guest.wait_rounds(2, 30)
    guest.command("stop")
    guest.wait_status(lambda status: status.phase == "done", 10)
    return guest


def test_verifier_finds_what_is_damaged_from_the_host(still_guest: Guest) -> None:
    assert still_guest.verify() == 0
    noisy, bitten, lost = (unlike_others(still_guest, first) for first in (9000, 11000, 13000))
    stale, generation = first_rewritten(still_guest)
    last_byte = still_guest.page_content(bitten)[4095]
    damages = [
        Damage(noisy, 1, 128, os.urandom(64), "other"),
        Damage(bitten, 1, 4095, bytes([last_byte ^ 1]), "other"),
        Damage(lost, 1, 0, bytes(4096), "zeros"),
        Damage(stale, generation, 0, still_guest.page_content(stale, generation - 1), "previous generation"),
    ]
    for count, damage in enumerate(damages, start=1):
        content = still_guest.page_content(damage.page, damage.generation)
        path, offset = still_guest.find_page(content)
        assert offset == still_guest.where(damage.page).gpa
        overwrite(path, offset + damage.at, damage.content)
        assert still_guest.verify() == count, "this one is found, and those before are repaired"
        told = wait_events(still_guest, "error", count)[-1]
        assert (told["page"], told["generation"], told["gpa"]) == (damage.page, damage.generation, offset)
        assert (told["looks_like"], told["persistent"]) == (damage.looks_like, True)
        wrong = [i for i, byte in enumerate(damage.content, start=damage.at) if byte != content[i]]
        assert (told["offset"], told["wrong_bytes"]) == (wrong[0], len(wrong))


def test_guest_of_nobody_in_the_sandbox(guest_factory: GuestFactory) -> None:
    guest = guest_factory(
        GuestConfig(name="nobody", memory_mib=192, workload=SMALL.workload, run_as_nobody=True, sandbox=True)
    )
    guest.wait_filled()
    nobody = pwd.getpwnam("nobody").pw_uid
    for task in Path(f"/proc/{guest.pid}/task").iterdir():
        facts = dict(line.split(":\t", 1) for line in (task / "status").read_text().splitlines() if ":\t" in line)
        assert facts["Uid"].split() == [str(nobody)] * 4
        assert (facts["Seccomp"], facts["CapEff"], facts["CapBnd"]) == ("2", "0" * 16, "0" * 16)
    assert guest.verify() == 0


def test_hotplugged_memory_is_a_second_memfd_that_the_guest_fills(guest_factory: GuestFactory) -> None:
    guest = guest_factory(GuestConfig(name="hotplug", memory_mib=192, workload=SMALL.workload, hotplug_slots=2))
    guest.wait_filled()
    (first,) = guest.memfd_paths
    guest.hotplug(128)
    paths = guest.memfd_paths
    assert len(paths) == 2 and first in paths
    guest.grow(180)
    (second,) = (path for path in paths if path != first)
    assert second.stat().st_size == 128 << 20
    assert second.stat().st_blocks * 512 >= 32 << 20
    assert guest.verify() == 0


def test_balloon_takes_freed_memory_from_the_memfd(guest_factory: GuestFactory) -> None:
    guest = guest_factory(GuestConfig(name="balloon", memory_mib=224, workload=SMALL.workload, balloon=True))
    guest.wait_filled()
    guest.grow(96)
    guest.shrink(16)
    before = guest.memfd_resident_bytes()
    guest.balloon(144)
    assert guest.memfd_resident_bytes() <= before - (64 << 20)
    guest.balloon(224)
    guest.grow(64)
    assert guest.verify() == 0


def test_free_page_reporting_takes_freed_memory_from_the_memfd(guest_factory: GuestFactory) -> None:
    guest = guest_factory(
        GuestConfig(name="reporting", memory_mib=352, workload=SMALL.workload, free_page_reporting=True)
    )
    guest.wait_filled()
    guest.grow(224)
    before = guest.memfd_resident_bytes()
    guest.shrink(16)
    deadline = time.monotonic() + 30
    # Only whole blocks of 2 MiB and more are reported: about half of what is freed.
    while guest.memfd_resident_bytes() > before - (64 << 20) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert guest.memfd_resident_bytes() <= before - (64 << 20)
    assert guest.verify() == 0


@pytest.mark.parametrize(("backend", "share", "memfds"), [("memfd", False, 1), ("ram", True, 0)])
def test_memory_not_a_shared_memfd(guest_factory: GuestFactory, backend: Backend, share: bool, memfds: int) -> None:
    guest = guest_factory(
        GuestConfig(name="other", memory_mib=160, workload=Workload(mib=16), backend=backend, share=share)
    )
    guest.wait_filled()
    assert len(guest.memfd_paths) == memfds
    with pytest.raises(GuestError, match="in none of"):  # what is written to a private mapping stays there
        guest.find_page(guest.page_content(1))


def test_locked_memory(guest_factory: GuestFactory) -> None:
    guest = guest_factory(GuestConfig(name="locked", memory_mib=160, workload=Workload(mib=16), mem_lock=True))
    guest.wait_filled()
    locked_kib = int(Path(f"/proc/{guest.pid}/status").read_text().split("VmLck:")[1].split()[0])
    assert locked_kib >= 160 << 10


def test_failures_carry_the_console_and_end_the_guest(guest_factory: GuestFactory) -> None:
    guest = guest_factory(GuestConfig(name="greedy", memory_mib=160, workload=Workload(mib=400)))
    with pytest.raises(GuestError, match=r"fl\.mib=400 asked for"):
        guest.wait_filled(60)
    bad = guest_factory(GuestConfig(memory_mib=160, extra_arguments=("-no-such-option",)))
    with pytest.raises(GuestError, match="no-such-option: invalid option"):
        bad.wait_booted(10)
    assert not bad.alive()


def test_guest_ends_with_the_process_that_started_it(guest_factory: GuestFactory, tmp_path: Path) -> None:
    script = f"""
import os
from pathlib import Path
from tests.system.guest import Guest, GuestConfig, Workload
guest = Guest(GuestConfig(memory_mib=160, run_as_nobody=True, workload=Workload(mib=16)), Path({str(tmp_path)!r}))
guest.start()
guest.wait_booted()
os.write(1, str(guest.pid).encode())
os._exit(0)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, timeout=60, check=True, cwd=REPOSITORY
    )
    process = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 10
    while is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_running(process)


def is_running(process: Path) -> bool:
    """A zombie that nobody reaps has ended."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_forced_accelerator_is_kept() -> None:
    assert choose_accelerator(GuestConfig(accelerator="tcg")) == "tcg"
