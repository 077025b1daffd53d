# SPDX-License-Identifier: Apache-2.0
"""What the agent reads of /proc: processes, host memory, the boot."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# A command line is at most this long for us; QEMU's are a few KiB, the kernel allows megabytes.
MAX_CMDLINE_BYTES: Final = 256 * 1024


@dataclass(frozen=True, slots=True, order=True)
class ProcessId:
    """A process for good: the start time (field 22 of /proc/PID/stat) tells a reused pid."""

    pid: int
    start_time_ticks: int

    def __str__(self) -> str:
        return f"{self.pid}-{self.start_time_ticks}"


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Of /proc/meminfo, in bytes."""

    total_bytes: int
    available_bytes: int


def parse_stat(stat: str) -> tuple[int, int]:
    """Parent's pid and start time in ticks from /proc/PID/stat. The name in it may hold spaces and brackets."""
    after_name = stat[stat.rindex(")") + 2 :].split()
    return int(after_name[1]), int(after_name[19])


def read_stat(pid: int, proc: Path = Path("/proc")) -> tuple[int, int] | None:
    """Parent's pid and start time in ticks; None when there is no such process."""
    try:
        return parse_stat((proc / str(pid) / "stat").read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, IndexError):
        return None


def process_id(pid: int, proc: Path = Path("/proc")) -> ProcessId | None:
    """The process that has this pid now."""
    stat = read_stat(pid, proc)
    return ProcessId(pid, stat[1]) if stat else None


def list_pids(proc: Path = Path("/proc")) -> set[int]:
    """Every process of this host."""
    return {int(name) for name in os.listdir(proc) if name.isdecimal()}


def parse_meminfo(content: str) -> HostMemory:
    """MemTotal and MemAvailable; 0 for a line that is missing."""
    kibibytes: dict[str, int] = {}
    for line in content.splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if name in {"MemTotal", "MemAvailable"} and words and words[0].isdecimal():
            kibibytes[name] = int(words[0])
    return HostMemory(kibibytes.get("MemTotal", 0) * 1024, kibibytes.get("MemAvailable", 0) * 1024)


def read_host_memory(proc: Path = Path("/proc")) -> HostMemory:
    """This host's RAM as the kernel counts it now."""
    return parse_meminfo((proc / "meminfo").read_text(encoding="ascii", errors="replace"))


def boot_id(proc: Path = Path("/proc")) -> str:
    """Changes with every boot of this host."""
    return (proc / "sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def shared_resident_bytes(pid: int, proc: Path = Path("/proc")) -> int:
    """Shared memory that a process has mapped and present (RssShmem); 0 when it cannot be read."""
    try:
        for line in (proc / str(pid) / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("RssShmem:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        return 0
    return 0
