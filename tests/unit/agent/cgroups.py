# SPDX-License-Identifier: Apache-2.0
"""A host's /proc, /sys and cgroups as files, with a VMM where libvirt puts it: below its scope's memory controller."""

from __future__ import annotations

from pathlib import Path

from frostline.agent.mglru import Mglru

SCOPE = "/machine.slice/machine-qemu\\x2d1\\x2dweb.scope"


class FakeHost:
    """One VMM, `pid`, and another process of the same cgroup; enough swap. cgroup v2 unless a test says otherwise."""

    pid = 4711

    def __init__(self, root: Path) -> None:
        self.proc, self.sys, self.mount = root / "proc", root / "sys", root / "cgroup mount"
        self.switch = self.sys / "kernel/mm/lru_gen/enabled"
        self.file = self.sys / "kernel/debug/lru_gen"
        self.scope = self.mount / SCOPE[1:]
        self.below = self.scope / "libvirt"
        for folder in (self.switch.parent, self.file.parent, self.below, self.proc / "sys/vm", self.proc / "self"):
            folder.mkdir(parents=True)
        self.switch.write_text("0x0007\n")
        (self.proc / "sys/vm/swappiness").write_text("60\n")
        self.meminfo(swap_free_kib=204796)
        self.cgroup_of(self.pid, f"0::{SCOPE}/libvirt\n")
        self.mounts("/", "cgroup2", "rw,nsdelegate")
        for folder in (self.mount, self.scope.parent, self.scope):
            (folder / "memory.stat").write_text("anon 1\n")
        for folder in (self.scope.parent, self.scope):
            (folder / "memory.swap.max").write_text("max\n")
            (folder / "memory.swap.current").write_text("0\n")
        (self.scope / "cgroup.procs").write_text("")
        (self.below / "cgroup.procs").write_text(f"{self.pid}\n4712\n")

    def meminfo(self, swap_free_kib: int) -> None:
        (self.proc / "meminfo").write_text(f"MemTotal: 1000 kB\nSwapTotal: 204796 kB\nSwapFree: {swap_free_kib} kB\n")

    def cgroup_of(self, pid: int, text: str) -> None:
        (self.proc / str(pid)).mkdir(exist_ok=True)
        (self.proc / str(pid) / "cgroup").write_text(text)

    def mounts(self, root: str, kind: str, options: str) -> None:
        point = str(self.mount).replace(" ", "\\040")
        (self.proc / "self/mountinfo").write_text(
            "22 1 8:1 / / rw,relatime - ext4 /dev/sda1 rw\n"
            f"33 29 0:28 {root} {point} rw,relatime shared:4 - {kind} cgroup {options}\n"
        )

    def lru_gen(self, text: str) -> None:
        self.file.write_text(text)

    def mglru(self) -> Mglru:
        return Mglru(self.proc, self.sys)
