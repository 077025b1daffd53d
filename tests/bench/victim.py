# SPDX-License-Identifier: Apache-2.0
"""The process whose memory is moved: ``native/bench/bench_victim.c``."""

from __future__ import annotations

import subprocess
from array import array
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from frostline.native import PAGE_BYTES
from tests.bench.errors import BenchError
from tests.bench.lines import LineProcess

MIB: Final = 1 << 20
ANY_CPU: Final = -1


@dataclass(frozen=True, slots=True)
class Programs:
    """Where the programs are, and which CPU the VM and which the one that moves its memory is pinned to."""

    folder: Path
    pager: Path
    vm_cpu: int
    mover_cpu: int

    def path(self, name: str) -> str:
        path = self.folder / name
        if not path.is_file():
            raise BenchError(f"{path} is missing; `make build` builds it")
        return str(path)


class Victim:
    """A running victim with ``mib`` MiB of filled memory."""

    def __init__(self, programs: Programs, mib: int, *, bare: bool = False) -> None:
        self.programs: Final = programs
        self.pages: Final = mib * MIB // PAGE_BYTES
        self.bytes: Final = mib * MIB
        command = [programs.path("bench_victim"), "--mib", str(mib), "--cpu", str(programs.vm_cpu)]
        if bare:
            command += ["--bare-cpu", str(programs.mover_cpu)]
        self.process: Final = LineProcess(command)
        try:
            if self.process.line() != "ready":
                raise BenchError("bench_victim did not become ready")
        except BaseException:
            self.process.close()
            raise

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.close()

    @property
    def pid(self) -> int:
        return self.process.pid

    def order(self, seed: int) -> None:
        """Another random order for what follows."""
        self.process.ask(f"order {seed}")

    def touch(self, first: int, count: int) -> array[int]:
        """Touch ``count`` pages of the order and give what each took, in ns, as the touching thread saw it."""
        self.process.send(f"touch {first} {count}")
        return self.touched(count)[0]

    def touched(self, count: int) -> tuple[array[int], int]:
        """The answer to a touch that was sent before: the times, and CLOCK_MONOTONIC ns at its end."""
        said, errors, end_ns = (int(word) for word in self.process.line().split())
        times = array("I")
        times.frombytes(self.process.exactly(said * times.itemsize))
        if errors or said != count:
            raise BenchError(f"{errors} of {said} pages did not hold what was written into them")
        return times, end_ns

    def sweep_ns(self, step: int) -> int:
        """Touch every ``step``-th page in address order; what all of it took."""
        self.process.send(f"sweep {step}")
        return int(self.process.line().split()[0])

    def verify(self, first: int, count: int) -> None:
        """Every byte of these pages of the order is what was written."""
        errors = self.process.ask(f"verify {first} {count}")[0]
        if errors:
            raise BenchError(f"{errors} of {count} pages do not hold what was written into them")

    def resident_pages(self) -> int:
        return self.process.ask("resident")[0]

    def punch(self) -> None:
        """Drop everything from the file; only for a victim with a bare server, which has a copy."""
        self.process.ask("punch")

    def bare_median_ns(self) -> int:
        return self.process.ask("bare")[0]

    def page_out_ns(self) -> int:
        """process_madvise(MADV_PAGEOUT) over all of the memory, from outside; what the calls took."""
        address, size = self.process.ask("where")
        command = [
            self.programs.path("bench_pageout"), str(self.pid), str(address), str(size), str(self.programs.mover_cpu),
        ]  # fmt: skip
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        return int(done.stdout.split()[1])
