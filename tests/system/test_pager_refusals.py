# SPDX-License-Identifier: Apache-2.0
"""VMs that must not be tiered: the pager says why with its exit code, and leaves them as they were."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from frostline.native import Refusal, State, inspect
from frostline.native.binary import pager_path
from tests.conftest import GuestFactory
from tests.system.guest import Guest, GuestConfig, Workload
from tests.system.pager_rig import PagerRig, descriptors, shared_mappings

TINY = Workload(mib=32, hot_mib=4, rate=50)
MAGIC = "464c5f7661756c74"  # what a vault begins with, and a version
CONFIG = GuestConfig(name="tiny", memory_mib=160, workload=TINY)
pytestmark = pytest.mark.timeout(300)

# Seizes a process like a debugger, without stopping it, and holds on until its stdin is closed.
_TRACER = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.ptrace.argtypes = [ctypes.c_long] * 4
if libc.ptrace(0x4206, int(sys.argv[1]), 0, 0):
    sys.exit(f"PTRACE_SEIZE: errno {ctypes.get_errno()}")
print("ready", flush=True)
sys.stdin.read()
"""

# Maps the guest's memory for itself, as a vhost-user backend does.
_MAPPER = """
import mmap, os, sys
memory = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 1 << 20, mmap.MAP_SHARED)
print("ready", flush=True)
sys.stdin.read()
"""

# A process that looks like an attached VMM: shared memfd as guest memory, and a "vault" of our making.
_VICTIM = """
import mmap, os, sys
guest = os.memfd_create("memory-backend-memfd")
os.truncate(guest, 4 << 20)
memory = mmap.mmap(guest, 4 << 20, mmap.MAP_SHARED)
vault = os.memfd_create("frostline-vault", os.MFD_CLOEXEC)
os.truncate(vault, int(sys.argv[1]))
os.pwrite(vault, bytes.fromhex(sys.argv[2]), 0)
print("ready", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def helper(program: str, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A small process that says when it is ready and ends with its stdin."""
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n", f"the helper ended with {process.wait(10)}"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def refuse(guest: Guest, folder: Path, reason: Refusal, *more: Refusal) -> str:
    """The pager refuses with the reason, says so in its log, and nothing of the VMM has changed."""
    before = descriptors(guest.pid), shared_mappings(guest.pid)
    with PagerRig(guest, folder) as rig:
        found = Refusal(rig.refused())
        assert found in (reason, *more), f"{found!r}: {rig.words()}"
        said = rig.entries("refused_because")
        assert said, rig.words()
    assert (descriptors(guest.pid), shared_mappings(guest.pid)) == before
    assert guest.wait_rounds(1, 20).errors == 0
    return str(said[-1])


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GuestConfig(name="private", memory_mib=160, workload=TINY, share=False), Refusal.NOT_SHARED_MEMFD),
        (GuestConfig(name="ram", memory_mib=160, workload=TINY, backend="ram"), Refusal.NOT_SHARED_MEMFD),
        (GuestConfig(name="locked", memory_mib=160, workload=TINY, mem_lock=True), Refusal.LOCKED),
    ],
    ids=lambda value: value.name if isinstance(value, GuestConfig) else "",
)
def test_a_guest_whose_memory_cannot_be_tiered(
    guest_factory: GuestFactory, tmp_path: Path, config: GuestConfig, reason: Refusal
) -> None:
    guest = guest_factory(config)
    guest.wait_filled()
    seen = inspect(guest.pid)
    assert seen.refusal is reason and seen.detail, seen
    refuse(guest, tmp_path / "pager", reason)


def test_reasons_that_pass(guest_factory: GuestFactory, tmp_path: Path) -> None:
    """A debugger, another mapper, another pager: refused while they are there, served when they are gone."""
    guest = guest_factory(CONFIG)
    guest.wait_filled()
    with helper(_TRACER, str(guest.pid)) as tracer:
        assert f"pid {tracer.pid}" in refuse(guest, tmp_path / "traced", Refusal.TRACED)
    with helper(_MAPPER, str(guest.memfd_paths[0])) as mapper:
        assert f"{mapper.pid}" in refuse(guest, tmp_path / "mapped", Refusal.OTHER_MAPPER)
    with PagerRig(guest, tmp_path / "first", "--scan-interval-ms", "300") as first:
        first.start()
        served = first.evict(20)
        assert f"{served.pager_pid}" in refuse(guest, tmp_path / "second", Refusal.ALREADY_SERVED)
        assert inspect(guest.pid).refusal is Refusal.ALREADY_SERVED
        assert first.status().pager_pid == served.pager_pid
        first.detach()
    assert guest.verify() == 0


def test_two_pagers_started_at_once_end_as_one(guest_factory: GuestFactory, tmp_path: Path) -> None:
    guest = guest_factory(CONFIG)
    guest.wait_filled()
    for attempt in range(3):
        with contextlib.ExitStack() as stack:
            rigs = [stack.enter_context(PagerRig(guest, tmp_path / f"{attempt}-{number}")) for number in range(2)]
            processes = [rig.spawn() for rig in rigs]
            deadline = time.monotonic() + 15
            while (ended := [rig for rig in rigs if rig.process and rig.process.poll() is not None]) == []:
                assert time.monotonic() < deadline, "both serve one VM"
                time.sleep(0.02)
            assert len(ended) == 1, f"both gave up: {[process.poll() for process in processes]}"
            code = ended[0].wait_exit()
            # The slower one finds a vault, a tracer, a mapping or a range that is taken, as the moment may be.
            allowed = {Refusal.ALREADY_SERVED, Refusal.TRACED, Refusal.OTHER_MAPPER, Refusal.FOREIGN_UFFD}
            allowed |= {Refusal.STUCK}
            assert Refusal(code - 64) in allowed, ended[0].words()
            winner = next(rig for rig in rigs if rig is not ended[0])
            # It holds the vault before it listens.
            winner.until("the winner serves", lambda s: s.pager_alive and s.state is not State.STARTING)
            winner.detach()
        assert not [link for link in descriptors(guest.pid) if "userfaultfd" in link or "memfd:frostline" in link]
    assert guest.verify() == 0


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, ""),
        (4096, ""),
        (1 << 24, ""),
        (1 << 24, "464c5f7661756c74" + "ff" * 64),
        (65536, "464c5f7661756c7401000000"),
    ],
    ids=["empty", "one-page", "zeros", "garbage", "cut-off"],
)
def test_a_vault_that_is_none(tmp_path: Path, size: int, head: str) -> None:
    with helper(_VICTIM, str(size), head) as victim:
        before = descriptors(victim.pid), shared_mappings(victim.pid)
        done = subprocess.run(
            [*_pager(victim.pid, tmp_path)], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=False
        )
        assert done.returncode == 64 + Refusal.VAULT_INVALID, done
        assert b"vault" in done.stderr
        assert victim.poll() is None
        assert (descriptors(victim.pid), shared_mappings(victim.pid)) == before


def test_a_process_that_is_gone_or_no_vmm_at_all(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait(10)
    gone = subprocess.run([*_pager(ended.pid, tmp_path)], capture_output=True, timeout=20, check=False)
    assert gone.returncode == 64 + Refusal.GONE, gone
    with helper("import sys\nprint('ready', flush=True)\nsys.stdin.read()") as other:
        none = subprocess.run([*_pager(other.pid, tmp_path)], capture_output=True, timeout=20, check=False)
        assert none.returncode == 64 + Refusal.NOT_SHARED_MEMFD, none
        assert other.poll() is None


def _pager(pid: int, folder: Path) -> list[str]:
    return [str(pager_path()), "--pid", str(pid), "--socket", str(folder / "p.sock")]
