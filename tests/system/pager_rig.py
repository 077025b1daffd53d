# SPDX-License-Identifier: Apache-2.0
"""A real frostline-pager at a real guest, commanded and watched through frostline.native."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from frostline.native import Command, CommandKind, NativeError, Pager, PagerExit, Reply, Status, View
from frostline.native.binary import pager_path
from tests.system.guest import Guest

MIB: Final = 1 << 20
PAGES_PER_MIB: Final = 256
LEASE_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.02
_END_SECONDS: Final = 30.0


class PagerRig:
    """Pagers of one guest, one after the other. A context manager that leaves no process behind.

    ``launcher`` is put before the pager's command line. Limits are seconds; failures are AssertionError with the
    pager's last words.
    """

    def __init__(self, guest: Guest, folder: Path, *options: str, launcher: Sequence[str] = ()) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.guest: Final = guest
        self.log: Final = folder / "pager.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._options: Final = options
        self._launcher: Final = launcher
        self._interval_ms: Final = int(dict(itertools.pairwise(options)).get("--scan-interval-ms", 10_000))
        # A test's own folder may be too deep for a socket's 107 bytes.
        self._sockets: Final = tempfile.TemporaryDirectory(prefix="fl-pager-")
        self.socket: Final = f"{self._sockets.name}/p.sock"
        self._view: View | None = None

    # --- life ---

    def spawn(self) -> subprocess.Popen[bytes]:
        """Start a pager and do not wait for anything."""
        command = [*self._launcher, str(pager_path()), "--pid", str(self.guest.pid), "--socket", self.socket]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *self._options], stdin=subprocess.DEVNULL, stderr=log)
        return self.process

    def start(self, seconds: float = 15) -> Self:
        """Start a pager and wait until it answers."""
        process = self.spawn()
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(NativeError):
                if self.call(CommandKind.PING).pager_pid == process.pid:
                    return self
            assert process.poll() is None, f"the pager ended with {process.poll()}; {self.words()}"
            assert time.monotonic() < deadline, f"the pager does not answer after {seconds} s; {self.words()}"
            time.sleep(_POLL_SECONDS)

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(_END_SECONDS)

    def wait_exit(self, seconds: float = _END_SECONDS) -> int:
        assert self.process is not None, "no pager was started"
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the pager still runs after {seconds} s; {self.words()}") from None

    def refused(self, seconds: float = 15) -> int:
        """Start a pager that must refuse; gives the refusal's number."""
        self.spawn()
        code = self.wait_exit(seconds)
        assert code > PagerExit.REFUSED, f"not refused, but ended with {code}; {self.words()}"
        return code - PagerExit.REFUSED

    def detach(self, seconds: float = 60) -> None:
        """Ask for it, and see the pager end well."""
        self.done(CommandKind.DETACH)
        code = self.wait_exit(seconds)
        assert code == PagerExit.OK, f"detaching ended with {code}; {self.words()}"

    def close(self) -> None:
        self.kill()
        if self._view is not None:
            self._view.close()
        self._sockets.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- commands ---

    def call(self, kind: CommandKind, **fields: int) -> Reply:
        """One command on a connection of its own."""
        with Pager(self.socket) as pager:
            return pager.call(Command(kind, **fields), timeout_seconds=5)

    def done(self, kind: CommandKind, **fields: int) -> Reply:
        """One command that the pager must take."""
        reply = self.call(kind, **fields)
        assert reply.error == 0, f"{kind.name}: {os.strerror(reply.error)}: {reply.detail}"
        return reply

    def budget(
        self, mib: float, min_age: int = 2, lease: float = LEASE_SECONDS, rate_mib: float = 0, generation: int = 1
    ) -> None:
        """Leave to have so many MiB away. ``min_age``: in scans."""
        self.done(
            CommandKind.BUDGET,
            budget_bytes=int(mib * MIB),
            min_age_ns=min_age * self._interval_ms * 1_000_000,
            lease_ns=int(lease * 1e9),
            rate_bytes=int(rate_mib * MIB),
            generation=generation,
        )

    # --- what can be seen ---

    @property
    def view(self) -> View:
        if self._view is None:
            self._view = View(self.guest.pid)
        return self._view

    def status(self) -> Status:
        return self.view.status()

    def until(self, what: str, wanted: Callable[[Status], bool], seconds: float = 60) -> Status:
        """Wait for a status for which ``wanted`` is true."""
        deadline = time.monotonic() + seconds
        while not wanted(status := self.status()):
            assert time.monotonic() < deadline, f"not within {seconds} s: {what}; {brief(status)}; {self.words()}"
            time.sleep(_POLL_SECONDS)
        return status

    def evict(self, mib: float, budget_mib: float | None = None, seconds: float = 60, min_age: int = 2) -> Status:
        """Have so much away, within ``budget_mib``: by default a little more, for what comes back meanwhile."""
        self.budget(mib + 8 if budget_mib is None else budget_mib, min_age)
        return self.until(f"{mib} MiB away", lambda s: s.evicted_bytes >= mib * MIB, seconds)

    def drain(self, seconds: float = 60) -> Status:
        self.done(CommandKind.DRAIN)
        return self.until("nothing away", lambda s: s.evicted_pages == 0, seconds)

    def entries(self, event: str) -> list[dict[str, Any]]:
        """The log lines of that event."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict) and said.get("event") == event:
                    found.append(said)
        return found

    def words(self, lines: int = 8) -> str:
        """The end of the log, for a failure's text."""
        said = self.log.read_text(errors="replace").splitlines()[-lines:] if self.log.exists() else []
        return "the pager's last words:\n" + ("\n".join(said) or "(none)")


def brief(status: Status) -> str:
    """What a failure's text needs of a status."""
    return (
        f"state={status.state.word} why={status.why.word} alive={status.pager_alive} scans={status.scans} "
        f"failed_scans={status.scan_failures} budget={status.budget_bytes / MIB:.0f}MiB "
        f"away={status.evicted_bytes / MIB:.1f}MiB resident={status.resident_bytes / MIB:.1f}MiB "
        f"pool={status.pool_bytes / MIB:.1f}MiB evictions={status.evictions} cancelled={status.evictions_cancelled} "
        f"faults={status.faults} brake={status.brake_permille} takeovers={status.takeovers} "
        f"checksum_errors={status.checksum_errors}"
    )


def descriptors(pid: int) -> list[str]:
    """What a process has open, as /proc shows it, sorted; sockets and the like by kind only."""
    links = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            links.append(os.readlink(entry.path).partition(":[")[0])
    return sorted(links)


def shared_mappings(pid: int) -> list[str]:
    """The shared mappings of a process: addresses, permissions, offset and file."""
    with open(f"/proc/{pid}/smaps") as smaps:
        lines = [line.split() for line in smaps]
    found = []
    for words in lines:
        if len(words) >= 6 and "-" in words[0] and words[1][3:] == "s":
            found.append(" ".join([words[0], words[1], words[2], *words[5:]]))
        elif words[0] == "VmFlags:" and found and not found[-1].startswith("flags"):
            found.append("flags " + " ".join(sorted(set(words[1:]) & {"um", "uw", "lo", "io"})))
    return [line for line in found if line != "flags "]
