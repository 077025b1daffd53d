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


class Failed(BenchError):  # noqa: N818
    """A run that did not come to its end; ``measured`` is what it had measured before."""

    def __init__(self, why: str, measured: list[Measured]) -> None:
        super().__init__(why)
        self.measured: Final = measured


class Place(Protocol):
    """``run``: bench_trackers with these arguments, within its limit. Failed when it fails."""

    def run(self, arguments: Sequence[str], limit_seconds: float) -> list[Measured]: ...


def parse_lines(text: str) -> list[Measured]:
    """What is there up to the last whole line; lines that are no JSON are for people."""
    return [parse(json.loads(line)) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]


class OwnKernel:
    def __init__(self, program: Path) -> None:
        self._program: Final = program

    def run(self, arguments: Sequence[str], limit_seconds: float) -> list[Measured]:
        command = [str(self._program), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds, check=False)
        except subprocess.TimeoutExpired as error:
            raise Failed(f"{' '.join(command)} did not end in {limit_seconds:g} s", []) from error
        if done.returncode not in (0, SKIPPED):
            why = f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()}"
            raise Failed(why, parse_lines(done.stdout))
        return parse_lines(done.stdout)


class BootedKernel:
    def __init__(self, kernel: Kernel) -> None:
        self._kernel: Final = kernel

    def run(self, arguments: Sequence[str], limit_seconds: float) -> list[Measured]:
        done = self._kernel.run([f"/bench/{PROGRAM}", *arguments], limit_seconds)
        if done.over_limit or done.code not in (0, SKIPPED):
            ended = f"over its limit of {limit_seconds:g} s" if done.over_limit else f"exit {done.code}"
            why = f"{' '.join(arguments)}: {ended}: {done.stderr.strip()[-1000:]}"
            raise Failed(why, parse_lines(done.stdout))
        return parse_lines(done.stdout)


@contextmanager
def booted(program: Path, folder: Path, kernel: GuestKernel | None) -> Iterator[tuple[BootedKernel, str]]:
    """A place in a freshly booted kernel (None: the newest Debian one), and the kernel's release."""
    config = KernelConfig(memory_mib=KERNEL_MEMORY_MIB, added={f"/bench/{PROGRAM}": program})
    with Kernel(config, folder, kernel) as running:
        yield BootedKernel(running), running.ready_text.splitlines()[0]
