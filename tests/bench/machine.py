# SPDX-License-Identifier: Apache-2.0
"""The machine that the figures are of."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

QUIET_LOAD = 0.5


@dataclass(frozen=True, slots=True)
class Machine:
    cpu: str
    cores: int
    kernel: str
    architecture: str
    memory_bytes: int
    load_average: float

    @property
    def quiet(self) -> bool:
        return self.load_average <= QUIET_LOAD

    def as_json(self) -> dict[str, object]:
        return asdict(self)


def _field(path: str, name: str) -> str:
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def this_machine() -> Machine:
    return Machine(
        cpu=_field("/proc/cpuinfo", "model name") or platform.processor() or "unknown",
        cores=len(os.sched_getaffinity(0)),
        kernel=platform.release(),
        architecture=platform.machine(),
        memory_bytes=int(_field("/proc/meminfo", "MemTotal").split()[0]) * 1024,
        load_average=os.getloadavg()[0],
    )


def available_bytes() -> int:
    """What the kernel says can be had without swapping."""
    return int(_field("/proc/meminfo", "MemAvailable").split()[0]) * 1024
