# SPDX-License-Identifier: Apache-2.0
"""Where the trackers are measured: on the machine's own kernel, or inside a kernel booted for it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from tests.bench.errors import BenchError
from tests.bench.trackers.points import Point, Probe, Steady, parse
from tests.kernel import Kernel, KernelConfig
from tests.system.guest.kernel import GuestKernel

PROGRAM: Final = "bench_trackers"
SKIPPED: Final = 77
KERNEL_MEMORY_MIB: Final = 3072

Measured = Probe | Point | Steady


class Place(Protocol):
    """``run``: bench_trackers with these arguments, within its limit. BenchError when it fails."""

    def run(self, arguments: Sequence[str], limit_seconds: float) -> list[Measured]: ...


def parse_lines(text: str) -> list[Measured]:
    return [parse(json.loads(line)) for line in text.splitlines() if line.startswith("{")]


class OwnKernel:
    def __init__(self, program: Path) -> None:
        self._program: Final = program

    def run(self, arguments: Sequence[str], limit_seconds: float) -> list[Measured]:
        command = [str(self._program), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{' '.join(command)} did not end in {limit_seconds:g} s") from error
        if done.returncode not in (0, SKIPPED):
            raise BenchError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}")
        return parse_lines(done.stdout)


class BootedKernel:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel: Final = kernel

    def run(self, arguments: Sequence[str], limit_seconds: float) -> list[Measured]:
        done = self._kernel.run([f"/bench/{PROGRAM}", *arguments], limit_seconds)
        return parse_lines(done.check(0, SKIPPED).stdout)


@contextmanager
def booted(program: Path, folder: Path, kernel: GuestKernel | None) -> Iterator[tuple[BootedKernel, str]]:
    """A place in a freshly booted kernel (None: the newest Debian one), and the kernel's release."""
    config = KernelConfig(memory_mib=KERNEL_MEMORY_MIB, added={f"/bench/{PROGRAM}": program})
    with Kernel(config, folder, kernel) as running:
        yield BootedKernel(running), running.ready_text.splitlines()[0]
