# SPDX-License-Identifier: Apache-2.0
"""A victim served by a real ``frostline-pager``, commanded through the public interface."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final

from frostline.native import (
    PAGE_BYTES,
    Command,
    CommandKind,
    NativeError,
    Pager,
    Record,
    RecordKind,
    State,
    Status,
    View,
)
from tests.bench.errors import BenchError
from tests.bench.lines import pinned_to
from tests.bench.victim import Victim

WAIT_SECONDS: Final = 60.0
# Nothing is scanned but when it is told to: scans during a measurement would be part of it.
NO_SCANS_MS: Final = 3_600_000
LEASE_NS: Final = 120 * 1_000_000_000


class ServedVictim:
    """Attaches on creation. ``fault_threads`` 0 leaves the pager's default."""

    def __init__(self, victim: Victim, folder: Path, fault_threads: int = 0) -> None:
        self.victim: Final = victim
        self._socket: Final = folder / f"pager-{victim.pid}.sock"
        self._fault_threads: Final = fault_threads
        self._process: subprocess.Popen[bytes] | None = None
        self._pager: Pager | None = None
        self._view: View | None = None
        self.start()

    def __enter__(self) -> ServedVictim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._disconnect()
        if self._process is not None:
            self._process.kill()
            self._process.wait(WAIT_SECONDS)

    @property
    def pager_pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def spawn(self) -> None:
        """Start a pager, and do not wait for it."""
        command = [
            str(self.victim.programs.pager), "--pid", str(self.victim.pid), "--socket", str(self._socket),
            "--scan-interval-ms", str(NO_SCANS_MS), "--stall-target-permille", "1000", "--log-level", "error",
            "--longest-io-ms", "0",
        ]  # fmt: skip
        if self._fault_threads:
            command += ["--fault-threads", str(self._fault_threads)]
        self._process = subprocess.Popen(command, preexec_fn=pinned_to(self.victim.programs.mover_cpu))

    def start(self) -> None:
        self.spawn()
        self.connect()

    def connect(self) -> None:
        """Wait until the pager answers."""
        self._disconnect()
        deadline = time.monotonic() + WAIT_SECONDS
        while self._pager is None:
            assert self._process is not None
            if self._process.poll() is not None:
                raise BenchError(f"the pager ended with {self._process.returncode}; its message is above")
            try:
                pager = Pager(str(self._socket))
                if pager.call(Command(CommandKind.PING)).pager_pid == self._process.pid:
                    self._pager, self._view = pager, View(self.victim.pid)
                    return
                pager.close()
            except NativeError:
                pass
            if time.monotonic() > deadline:
                raise BenchError(f"the pager of process {self.victim.pid} did not answer in {WAIT_SECONDS:.0f} s")
            time.sleep(0.0005)

    def status(self) -> Status:
        assert self._view is not None
        return self._view.status()

    def records(self, kind: RecordKind) -> list[Record]:
        """Records of this kind since the last call."""
        assert self._view is not None
        found, lost = self._view.records()
        if lost:
            raise BenchError(f"{lost} records of process {self.victim.pid} were overwritten before they were read")
        return [record for record in found if record.kind is kind]

    def scan(self) -> Record:
        """One whole scan; its record."""
        before = self.status().scans
        self.records(RecordKind.SCAN)
        for _ in range(20):  # a scan that could not be harvested, the first one, only arms
            self.command(Command(CommandKind.SCAN))
            if self._until(lambda: self.status().scans > before, 3.0):
                return self.records(RecordKind.SCAN)[-1]
        raise BenchError(f"no scan of process {self.victim.pid} succeeded; the pager's log is above")

    def age_everything(self) -> None:
        """After this every resident page has an age of one scan at least."""
        self.scan()
        self.scan()

    def evict_everything(self) -> list[Record]:
        """Evict all that is old enough, without a rate limit; the EVICT records. Ends without a lease."""
        self.records(RecordKind.EVICT)
        self.command(
            Command(CommandKind.BUDGET, budget_bytes=self.victim.bytes, lease_ns=LEASE_NS, min_age_ns=1, generation=1)
        )
        wanted = self.victim.pages * 99 // 100
        found: list[Record] = []

        def gone() -> bool:
            found.extend(self.records(RecordKind.EVICT))
            return self.status().evicted_pages >= wanted

        if not self._until(gone, WAIT_SECONDS):
            status = self.status()
            raise BenchError(
                f"{status.evicted_pages} of {self.victim.pages} pages left in {WAIT_SECONDS:.0f} s "
                f"(state {status.state.word}, why {status.why.word})"
            )
        time.sleep(0.05)  # the last burst under way
        found.extend(self.records(RecordKind.EVICT))
        self.command(Command(CommandKind.BUDGET, budget_bytes=self.victim.bytes, generation=1))
        return found

    def drain(self) -> None:
        self.command(Command(CommandKind.DRAIN))
        if not self._until(lambda: self.status().evicted_pages == 0, WAIT_SECONDS):
            raise BenchError(f"process {self.victim.pid} was not drained in {WAIT_SECONDS:.0f} s")

    def detach(self) -> None:
        assert self._process is not None
        self.command(Command(CommandKind.DETACH))
        code = self._process.wait(WAIT_SECONDS)
        self._disconnect()
        if code != 0:
            raise BenchError(f"the pager ended with {code} on detaching; its message is above")

    def kill(self) -> int:
        """SIGKILL the pager; CLOCK_MONOTONIC ns at which that was sent."""
        assert self._process is not None
        at_ns = time.monotonic_ns()
        os.kill(self._process.pid, signal.SIGKILL)
        return at_ns

    def reap(self) -> None:
        """Wait until a killed pager is gone, and its lock with it."""
        assert self._process is not None
        self._process.wait(WAIT_SECONDS)
        self._disconnect()

    def command(self, command: Command) -> None:
        assert self._pager is not None
        reply = self._pager.call(command, timeout_seconds=10.0)
        if reply.error:
            raise BenchError(
                f"{command.kind.name} of process {self.victim.pid}: {os.strerror(reply.error)}: {reply.detail}"
            )
        if reply.state is State.CORRUPT:
            raise BenchError(f"a page of process {self.victim.pid} failed its check")

    def _until(self, condition: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True

    def _disconnect(self) -> None:
        if self._pager is not None:
            self._pager.close()
        if self._view is not None:
            self._view.close()
        self._pager, self._view = None, None


def mib_per_second(records: list[Record]) -> tuple[float, float]:
    """Of EVICT records: by their own durations, and by the clock from the first to the last."""
    moved = sum(record.pages for record in records) * PAGE_BYTES / (1 << 20)
    busy = sum(record.end_ns - record.start_ns for record in records) / 1e9
    wall = (max(record.end_ns for record in records) - min(record.start_ns for record in records)) / 1e9
    return moved / busy, moved / wall
