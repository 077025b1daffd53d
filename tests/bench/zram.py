# SPDX-License-Identifier: Apache-2.0
"""Swap on zram with lz4 and page-cluster 0, for as long as a ``with`` block lasts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.bench.errors import Skipped
from tests.bench.lines import LineProcess


@contextmanager
def zram_swap(size_bytes: int) -> Iterator[Path]:
    """The device's folder in sysfs. Raises Skipped when this machine does not let us."""
    keeper = LineProcess([sys.executable, "-m", "tests.bench.zram_keeper", str(size_bytes)], new_session=True)
    try:
        word, _, rest = keeper.line().partition(" ")
        if word != "ready":
            raise Skipped(f"no zram: {rest}")
        yield Path("/sys/block") / rest
    finally:
        keeper.close(timeout_seconds=120.0)


def compression_ratio(device: Path) -> float:
    """What was swapped to it, by what that takes once compressed; 0 when there is nothing."""
    original, compressed = (int(word) for word in (device / "mm_stat").read_text().split()[:2])
    return original / compressed if compressed else 0.0
