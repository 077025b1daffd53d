# SPDX-License-Identifier: Apache-2.0
"""The bench's swap on zram is there while the bench runs, and the machine is as before however that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.bench.errors import Skipped
from tests.bench.zram import zram_swap

SIZE = 64 << 20
WAIT_SECONDS = 30.0
# Whoever starts tests in the background has them ignore SIGINT, and so would what they start.
HOLD = f"""\
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from tests.bench.zram import zram_swap
with zram_swap({SIZE}) as device:
    print(device.name, flush=True)
    time.sleep(60)
"""


def _machine() -> tuple[str, list[str], str]:
    devices = sorted(path.name for path in Path("/sys/block").glob("zram*"))
    swaps = "\n".join(line.split()[0] for line in Path("/proc/swaps").read_text().splitlines())  # not how much is used
    return swaps, devices, Path("/proc/sys/vm/page-cluster").read_text()


def _wait_for(wanted: tuple[str, list[str], str]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while _machine() != wanted and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _machine() == wanted


@contextmanager
def _skipping() -> Iterator[None]:
    try:
        yield
    except Skipped as reason:
        pytest.skip(str(reason))


def test_swap_is_there_inside_and_gone_outside() -> None:
    before = _machine()
    with _skipping(), zram_swap(SIZE) as device:
        assert f"/dev/{device.name}" in Path("/proc/swaps").read_text()
        assert Path("/proc/sys/vm/page-cluster").read_text().strip() == "0"
        assert "[lz4]" in (device / "comp_algorithm").read_text()
        assert device.name not in before[1], "a device that was there before was taken"
    assert _machine() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_swap_goes_with_a_bench_that_is_killed(number: signal.Signals) -> None:
    before = _machine()
    with _skipping(), zram_swap(SIZE):
        pass
    bench = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        assert bench.stdout is not None and bench.stdout.readline().startswith(b"zram")
        assert _machine() != before
        os.killpg(bench.pid, number)  # as Ctrl-C does, to all of them
        bench.wait(WAIT_SECONDS)
    finally:
        bench.kill()
        bench.communicate()
    _wait_for(before)
