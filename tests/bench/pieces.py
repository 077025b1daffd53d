# SPDX-License-Identifier: Apache-2.0
"""Where the time of a fault and of an eviction goes: ``native/bench/bench_pieces.c``."""

from __future__ import annotations

import subprocess

from tests.bench.victim import Programs


def measure(programs: Programs) -> dict[str, dict[str, int]]:
    """Medians in ns a page, by group (``fault``, ``evict``) and piece."""
    done = subprocess.run(
        [programs.path("bench_pieces"), str(programs.mover_cpu)],
        check=True,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found: dict[str, dict[str, int]] = {}
    for line in done.stdout.splitlines():
        group, name, nanoseconds = line.split()
        found.setdefault(group, {})[name] = int(nanoseconds)
    return found
