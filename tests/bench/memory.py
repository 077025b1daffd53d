# SPDX-License-Identifier: Apache-2.0
"""What a pager and a vault take of the host's memory, and an agent of its CPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.bench.errors import BenchError
from tests.bench.served import ServedVictim

_MAPPING = re.compile(r"^[0-9a-f]+-[0-9a-f]+ \S{4} ")
# The vault and the guest's memory; a memfd of any other name would count as the pager's own.
_NOT_OURS = re.compile(r"/memfd:(frostline|memory-backend-memfd)")


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    pager_bytes: int
    vault_mapped_bytes: int
    metadata_bytes: int
    guest_bytes: int

    @property
    def metadata_percent(self) -> float:
        return 100 * self.metadata_bytes / self.guest_bytes

    def as_json(self) -> dict[str, float]:
        return {**asdict(self), "metadata_percent": self.metadata_percent}


def _resident_by_mapping(pid: int) -> Iterator[tuple[str, int]]:
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if _MAPPING.match(line):
            name = line.split(maxsplit=5)[5] if len(line.split(maxsplit=5)) == 6 else ""
        elif line.startswith("Rss:"):
            yield name, int(line.split()[1]) * 1024


def measure(served: ServedVictim) -> MemoryFigures:
    """Resident memory of the pager, shared libraries included, but for what it maps of the vault and of the guest."""
    own = foreign = 0
    for name, resident in _resident_by_mapping(served.pager_pid):
        if _NOT_OURS.match(name):
            foreign += resident
        else:
            own += resident
    if not foreign:
        raise BenchError(f"process {served.pager_pid} maps no vault: the names of the memfds have changed")
    status = served.status()
    return MemoryFigures(own, foreign, status.metadata_bytes, status.memory_bytes)
