# SPDX-License-Identifier: Apache-2.0
"""The cold-size estimate of a memory cgroup, read from the generations of a living Linux 7.3.

A process stands where a VMM stands: shared memory, all of it filled, a part of it hot. The test itself has the kernel
look (the agent never does), with some seconds between, and the estimate is asked for these instead of two minutes.
"""

import json
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from .boot import Kernel, KernelConfig
from .channel import Running
from .kernels import Kernels
from .python_image import python_config, python_program

MIB = 1 << 20
ALL_BYTES, HOT_BYTES = 64 * MIB, 8 * MIB
_GROUP = "/sys/fs/cgroup/machine"
_FLUSH_BYTES = MIB
_COLD_SECONDS = 4.0
_LIMIT_SECONDS = 240.0
# Its memory is mapped when it is in the group already: what it was charged for before stays elsewhere.
_MEMORY = f"""#!{python_program()}
import mmap, os, signal, time
with open("{_GROUP}/cgroup.procs", "w") as group:
    group.write(str(os.getpid()))
memfd = os.memfd_create("memory-backend-memfd")
os.ftruncate(memfd, {ALL_BYTES})
memory = mmap.mmap(memfd, {ALL_BYTES})
wanted = {ALL_BYTES}
def touch_all(*_):
    global wanted
    wanted = {ALL_BYTES}
signal.signal(signal.SIGUSR1, touch_all)
while True:
    touched, wanted = wanted, {HOT_BYTES}
    for at in range(0, touched, 4096):
        memory[at] = 7
    # So much unmapped at once drops all TLB entries; a page whose entry stays is touched and looks as if it were not.
    with mmap.mmap(-1, {_FLUSH_BYTES}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as other:
        other.write(bytes({_FLUSH_BYTES}))
    if touched == {ALL_BYTES}:
        print("touched all, as", os.getpid(), flush=True)
    time.sleep(0.05)
"""
_ASK = f"""#!{python_program()}
import json, sys
from frostline.agent import mglru
mglru.COLD_AGES_SECONDS = ({_COLD_SECONDS}, *mglru.COLD_AGES_SECONDS)
pid = int(sys.argv[1])
found = mglru.Mglru().estimates([pid])[pid]
print(json.dumps({{"why_not": found}} if isinstance(found, str) else found.document()))
"""


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernel]:
    config = python_config(KernelConfig(memory_mib=1024, texts={"/tests/memory": _MEMORY, "/tests/ask": _ASK}))
    with Kernels(config, tmp_path_factory, "mglru") as kernels:
        yield kernels()


def look(kernel: Kernel, pid: int) -> None:
    """Have the kernel age the group: what was touched since the last look goes to the youngest generation.

    The process is stopped meanwhile: the kernel passes over the whole of one that is just then mapping or unmapping
    something (lru_gen's walk only tries mmap_lock), and over a page table (2 MiB) whose lock somebody has.
    """
    before = kernel.shell("cat /sys/kernel/debug/lru_gen")
    found = re.search(
        r"^memcg +(\d+) /machine\n node +0\n(?: +\d+.*\n)* +(\d+) +\d+ +\d+ +\d+ *$", before, re.MULTILINE
    )
    assert found, before
    kernel.shell(
        f"kill -STOP {pid}; until grep -q '^State:.T' /proc/{pid}/status; do sleep 0.1; done;"
        f" echo '+ {found[1]} 0 {found[2]} 200 1' > /sys/kernel/debug/lru_gen; kill -CONT {pid}"
    )


def ask(kernel: Kernel, pid: int) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(kernel.run(["/tests/ask", str(pid)], timeout=_LIMIT_SECONDS).check().stdout)
    return answer


def cold_bytes(answer: dict[str, Any]) -> list[int]:
    assert "ages" in answer, answer
    return [age["cold_bytes"] for age in answer["ages"]]


def wait_touched(memory: Running, times: int) -> int:
    memory.wait_for(lambda: memory.stdout().count("touched all") >= times, _LIMIT_SECONDS, "memory touched")
    return int(memory.stdout().split()[-1])


@pytest.mark.timeout(_LIMIT_SECONDS + 120)
def test_what_is_cold_is_estimated_and_marked_as_an_estimate(host: Kernel) -> None:
    host.shell(f"echo +memory > /sys/fs/cgroup/cgroup.subtree_control; mkdir {_GROUP}")
    memory = host.start(["/tests/memory"], timeout=_LIMIT_SECONDS)
    pid = wait_touched(memory, 1)
    # Without swap its generations would mean nothing, and before a look there is nothing to tell.
    assert "this host has no swap" in ask(host, pid)["why_not"]
    host.shell("echo 256M > /sys/block/zram0/disksize; mkswap /dev/zram0; swapon /dev/zram0")
    assert "the kernel has not looked at cgroup /machine yet" in ask(host, pid)["why_not"]

    look(host, pid)
    time.sleep(_COLD_SECONDS + 2)
    look(host, pid)
    answer = ask(host, pid)
    cold = cold_bytes(answer)
    # The interpreter's own memory is the group's, too, and much of it is cold: some MiB.
    assert (ALL_BYTES - HOT_BYTES) * 0.95 <= cold[0] <= ALL_BYTES - HOT_BYTES / 2, answer
    assert cold[1:] == [0, 0, 0, 0] and answer["sharers"] == 0, answer
    assert 0 <= answer["looked_seconds"] < 60 and answer["caveats"].startswith("an estimate for the whole cgroup")

    memory.signal(10)
    wait_touched(memory, 2)
    look(host, pid)
    answer = ask(host, pid)
    assert cold_bytes(answer)[0] <= ALL_BYTES / 8, answer
    memory.kill()
