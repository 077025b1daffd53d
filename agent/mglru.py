# SPDX-License-Identifier: Apache-2.0
"""How much of a VM that nobody is attached to looks cold to the kernel itself: an estimate, and shown as one.

The multi-gen LRU sorts the pages of each memory cgroup and NUMA node into up to four generations, and tells their
sizes in debugfs (kernel: Documentation/admin-guide/mm/multigen_lru.rst). From that follows what the cgroup had not
touched for how long *when the kernel last looked*, which it does under memory pressure or when told to. It does not
tell which pages, nor whose they are (the VMM's own memory is in it, and that of whoever shares the cgroup), nor what
of the guest's memory is charged elsewhere, locked, or in huge pages of hugetlbfs. It is only read here, never written
to: ageing on our account would clear ACCESS bits under other users of them.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from frostline.agent.memcg import MemoryGroup, NoGroupError, find_group, other_processes, why_not_aged

# Not seen touched for at least so long; the first one is what the working set is not.
COLD_AGES_SECONDS: Final = (120.0, 600.0, 3600.0, 21600.0)
# About 200 bytes a cgroup and node; and the kernel walks all cgroups anew for each 4 KiB that is read.
MAX_FILE_BYTES: Final = 2 * 2**20
MAX_READ_SECONDS: Final = 0.5
CAVEATS: Final = (
    "an estimate for the whole cgroup, the VMM's own memory included, as of when the kernel last looked; "
    "memory that is locked, huge or charged to another cgroup is not in it"
)
_READ_BYTES: Final = 64 * 1024
_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class NoEstimateError(Exception):
    """There is no estimate; the message says why, in a sentence."""


@dataclass(frozen=True, slots=True)
class Generation:
    """Pages of one generation; ``age_ms`` since it began to exist."""

    age_ms: int
    anon_pages: int


@dataclass(frozen=True, slots=True)
class Memcg:
    """A cgroup's generations, oldest first, for each NUMA node."""

    number: int
    path: str
    nodes: tuple[tuple[Generation, ...], ...]


@dataclass(frozen=True, slots=True)
class ColdEstimate:
    """Bytes not seen touched for at least each of COLD_AGES_SECONDS, ``looked_seconds`` ago."""

    cold_bytes: tuple[int, ...]
    looked_seconds: float
    sharers: int  # other processes whose memory is in it too

    def within(self, memory_bytes: int) -> ColdEstimate:
        """Never more than the VM has: what exceeds that is somebody else's."""
        return replace(self, cold_bytes=tuple(min(size, memory_bytes) for size in self.cold_bytes))

    def document(self) -> dict[str, Any]:
        """As plain data, with what has to be known of it."""
        ages = zip(COLD_AGES_SECONDS, self.cold_bytes, strict=True)
        return {
            "ages": [{"min_age_seconds": age, "cold_bytes": size} for age, size in ages],
            "looked_seconds": round(self.looked_seconds, 3),
            "sharers": self.sharers,
            "caveats": CAVEATS,
        }


def parse_lru_gen(text: str, wanted: Callable[[int, str], bool]) -> list[Memcg]:
    """The wanted cgroups (by number and path) of what ``lru_gen`` says. Raises NoEstimateError for what is none."""
    found: list[tuple[int, str, list[list[Generation]]]] = []
    nodes: list[list[Generation]] | None = None
    for place, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        try:
            if line.startswith("memcg"):
                number, path = int(words[1]), line.split(None, 2)[2] if len(words) > 2 else ""
                nodes = [] if wanted(number, path) else None
                if nodes is not None:
                    found.append((number, path, nodes))
            elif nodes is not None and words[0] == "node":
                nodes.append([])
            elif nodes is not None:
                _sequence, age_ms, anon_pages, _file_pages = (int(word) for word in words)
                nodes[-1].append(Generation(age_ms, anon_pages))
        except (ValueError, IndexError):
            raise NoEstimateError(f"line {place} of lru_gen is not as expected: {line[:80]!r}") from None
    return [Memcg(number, path, tuple(map(tuple, nodes))) for number, path, nodes in found]


def estimate(memcg: Memcg, sharers: int) -> ColdEstimate:
    """What a cgroup's generations say. Raises NoEstimateError when they say nothing.

    A page stands in the generation that was the youngest when it was last seen touched, so it was untouched from the
    birth of the next younger one to the last look, which gave birth to the youngest. Guest memory is anonymous or
    shared, which the kernel counts alike; the page cache beside it is left out.
    """
    cold_pages = [0] * len(COLD_AGES_SECONDS)
    looked_ms, looked = 0, False
    for generations in memcg.nodes:
        if not any(generation.anon_pages for generation in generations):
            continue
        youngest_ms = generations[-1].age_ms
        looked_ms = max(looked_ms, youngest_ms)
        looked |= generations[0].age_ms > youngest_ms
        for older, younger in itertools.pairwise(generations):
            # Ages are 32 bits wide and go round after 49 days: then this is too low, never too high.
            idle_seconds = (younger.age_ms - youngest_ms) / 1e3
            for index, age_seconds in enumerate(COLD_AGES_SECONDS):
                cold_pages[index] += older.anon_pages if idle_seconds >= age_seconds else 0
    if not any(generation.anon_pages for generations in memcg.nodes for generation in generations):
        raise NoEstimateError(f"the kernel's lists hold no memory of cgroup {memcg.path}: it is locked or huge")
    if not looked:
        raise NoEstimateError(f"the kernel has not looked at cgroup {memcg.path} yet: it does under memory pressure")
    return ColdEstimate(tuple(pages * _PAGE_BYTES for pages in cold_pages), looked_ms / 1e3, sharers)


class Mglru:
    """Reads the kernel's generations. Blocks on files, for MAX_READ_SECONDS and a little more at the most."""

    def __init__(self, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> None:
        self._proc: Final = proc
        self._switch: Final = sys / "kernel/mm/lru_gen/enabled"
        self._file: Final = sys / "kernel/debug/lru_gen"

    def why_not(self) -> str:
        """Why this host can tell nothing; empty when it may."""
        try:
            enabled = int(self._switch.read_text(encoding="ascii"), 16)
        except FileNotFoundError:
            return "needs a kernel with CONFIG_LRU_GEN"
        except (OSError, ValueError) as error:
            return f"{self._switch} cannot be read: {error}"
        if not enabled & 1:
            return f"is switched off; echo y >{self._switch} switches it on"
        try:
            os.close(os.open(self._file, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            return f"needs debugfs: mount -t debugfs debugfs {self._file.parent}"
        except OSError as error:
            return f"{self._file} cannot be read: {error.strerror}; it takes root, and a kernel that is not locked down"
        return ""

    def estimates(self, pids: Sequence[int]) -> dict[int, ColdEstimate | str]:
        """For each process its estimate, or the reason why there is none."""
        why_not = self.why_not() if pids else ""
        if why_not:
            return dict.fromkeys(pids, f"mglru {why_not}")
        answers: dict[int, ColdEstimate | str] = {}
        groups: dict[int, MemoryGroup] = {}
        for pid in pids:
            try:
                group = find_group(pid, self._proc)
            except NoGroupError as error:
                answers[pid] = str(error)
                continue
            answers[pid] = why_not_aged(group, self._proc)
            if not answers[pid]:
                groups[pid] = group
        if not groups:
            return answers
        try:
            memcgs = parse_lru_gen(self._read(), _wanted(groups.values()))
        except NoEstimateError as error:
            return answers | dict.fromkeys(groups, str(error))
        for pid, group in groups.items():
            try:
                answers[pid] = estimate(_chosen(group, memcgs), other_processes(group, pid))
            except NoEstimateError as error:
                answers[pid] = str(error)
        return answers

    def _read(self) -> str:
        """The whole file, within our limits."""
        deadline = time.monotonic() + MAX_READ_SECONDS
        content = bytearray()
        try:
            descriptor = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while chunk := os.read(descriptor, _READ_BYTES):
                    content += chunk
                    if len(content) > MAX_FILE_BYTES or time.monotonic() > deadline:
                        limits = f"{MAX_FILE_BYTES >> 20} MiB or {MAX_READ_SECONDS:g} s"
                        raise NoEstimateError(f"{self._file} is too long to be read: over {limits}")
            finally:
                os.close(descriptor)
        except OSError as error:
            raise NoEstimateError(f"{self._file} cannot be read: {error.strerror}") from None
        return content.decode("utf-8", "surrogateescape")


def _wanted(groups: Iterable[MemoryGroup]) -> Callable[[int, str], bool]:
    listed = list(groups)
    numbers, paths = {group.inode for group in listed}, {group.path for group in listed}
    return lambda number, path: number in numbers or path in paths


def _chosen(group: MemoryGroup, memcgs: Iterable[Memcg]) -> Memcg:
    """The group's line: its number is the inode in newer kernels; older ones have a number of their own there.

    From within a cgroup namespace its path is only the end of what the kernel writes.
    """
    listed = list(memcgs)
    for memcg in listed:
        if memcg.number == group.inode and (group.path == "/" or memcg.path.endswith(group.path)):
            return memcg
    for memcg in listed:
        if memcg.path == group.path:
            return memcg
    raise NoEstimateError(f"cgroup {group.path} is not in lru_gen")
