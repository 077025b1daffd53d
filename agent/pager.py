# SPDX-License-Identifier: Apache-2.0
"""One pager process: starting it, adopting a living one, commanding it, and how it ended."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from frostline.agent.processes import ProcessWatch
from frostline.agent.procfs import ProcessId, process_id
from frostline.agent.trackers import trackers_text
from frostline.native import Command, CommandKind, NativeError, Pager, PagerExit, Refusal, Reply, Tracker

# A pager's log is moved aside at its start when it is larger than this, and cut when it grows to twice that.
MAX_LOG_BYTES: Final = 2 * 2**20
LOG_TAIL_BYTES: Final = 16 * 1024
CALL_SECONDS: Final = 2.0
# Calls into pagers block their thread, so they have threads of their own: a stuck pager must not hold up others.
_CALLERS: Final = ThreadPoolExecutor(max_workers=16, thread_name_prefix="pager-call")


@dataclass(frozen=True, slots=True)
class PagerOptions:
    """How pagers are started; None leaves the pager's own default."""

    program: Path
    socket_dir: Path
    log_dir: Path | None  # None: the pager logs to the agent's stderr
    fault_threads: int | None = None
    scan_interval_ms: int | None = None
    pool_max_bytes: int | None = None
    stall_target_permille: int | None = None
    longest_io_ms: int | None = None
    log_level: str = "info"
    trackers: tuple[Tracker, ...] = ()  # in order of preference; none: all there are, in the pager's order

    def socket_path(self, vmm: ProcessId) -> Path:
        """The same for every agent that has this run folder, so that its successor finds the pager."""
        return self.socket_dir / f"{vmm}.sock"

    def log_path(self, vmm: ProcessId) -> Path | None:
        return self.log_dir / f"{vmm}.log" if self.log_dir else None

    def argv(self, vmm: ProcessId) -> list[str]:
        """The pager's command line."""
        argv = [str(self.program), "--pid", str(vmm.pid), "--socket", str(self.socket_path(vmm))]
        for option, value in (
            ("--fault-threads", self.fault_threads),
            ("--scan-interval-ms", self.scan_interval_ms),
            ("--pool-max-bytes", self.pool_max_bytes),
            ("--stall-target-permille", self.stall_target_permille),
            ("--longest-io-ms", self.longest_io_ms),
        ):
            if value is not None:
                argv += [option, str(value)]
        return [*argv, "--trackers", trackers_text(self.trackers), "--log-level", self.log_level]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a pager ended. ``code`` is None for an adopted one, whose exit code only its parent learns."""

    code: int | None
    refusal: Refusal
    detail: str

    @property
    def vm_gone(self) -> bool:
        return self.code == PagerExit.VM_GONE or self.refusal is Refusal.GONE

    @property
    def in_good_order(self) -> bool:
        """Detached or released: as somebody had told it to."""
        return self.code == PagerExit.OK


class PagerProcess:
    """A living pager, started by us or adopted."""

    def __init__(
        self, process: ProcessId, on_gone: Callable[[], None], child: subprocess.Popen[bytes] | None, log: Path | None
    ) -> None:
        self.pid: Final = process.pid
        self.watch: Final = ProcessWatch(process, on_gone)
        self._child: Final = child
        self._log: Final = log

    @property
    def adopted(self) -> bool:
        return self._child is None

    @property
    def gone(self) -> bool:
        return self.watch.gone.is_set()

    def ending(self) -> Ending:
        """Call it once ``gone``; reaps our child."""
        if self._child is None:
            return Ending(None, Refusal.NONE, "an adopted pager ended; its exit code is its parent's to know")
        try:
            code = self._child.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            return Ending(None, Refusal.NONE, "the pager ended but could not be reaped")
        if code > PagerExit.REFUSED:
            said = last_refusal(self._log)
            refusal = Refusal(code - PagerExit.REFUSED)
            return Ending(code, refusal, str(said.get("detail") or f"the pager refused: {refusal.word}"))
        if code < 0:
            return Ending(code, Refusal.NONE, f"killed by signal {-code}")
        words = {
            int(PagerExit.OK): "ended in good order",
            int(PagerExit.VM_GONE): "the VM has ended",
            int(PagerExit.USAGE): "did not understand its command line; pager and agent are of different versions",
        }
        return Ending(code, Refusal.NONE, words.get(code, f"exit code {code}; see {self._log or 'its log'}"))


def start_pager(options: PagerOptions, vmm: ProcessId, on_gone: Callable[[], None]) -> PagerProcess:
    """Start a pager in a session of its own: it outlives this agent. Raises OSError."""
    log = options.log_path(vmm)
    with contextlib.ExitStack() as stack:
        stderr: int | None = None
        if log is not None:
            rotate_log(log)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            stderr = os.open(log, flags, 0o600)
            stack.callback(os.close, stderr)
        child = subprocess.Popen(
            options.argv(vmm),
            stdin=subprocess.DEVNULL,
            stdout=stderr,
            stderr=stderr,
            start_new_session=True,
            close_fds=True,
            cwd="/",
        )
    started = process_id(child.pid)
    if started is None:
        child.wait(timeout=1.0)
        raise ProcessLookupError(f"the pager for process {vmm.pid} vanished at its start")
    return PagerProcess(started, on_gone, child, log)


def adopt_pager(pid: int, on_gone: Callable[[], None]) -> PagerProcess | None:
    """Watch a pager that an earlier agent, or another one, started; None when it is gone."""
    process = process_id(pid)
    return PagerProcess(process, on_gone, None, None) if process else None


class PagerLink:
    """Calls to one pager's socket, one at a time, off the event loop; reconnects when the pager was replaced."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self._pager: Pager | None = None
        self._lock: Final = asyncio.Lock()

    async def call(self, command: Command, timeout_seconds: float = CALL_SECONDS) -> Reply:
        """Raises NativeError when the pager does not answer; its own verdict is in the reply."""
        loop = asyncio.get_running_loop()
        async with self._lock:
            return await loop.run_in_executor(_CALLERS, self._call, command, timeout_seconds)

    async def ping(self) -> Reply | None:
        """None when nobody answers."""
        try:
            return await self.call(Command(CommandKind.PING))
        except NativeError:
            return None

    def close(self) -> None:
        """Forget the connection. The call in progress, if there is one, ends by its time limit."""
        pager, self._pager = self._pager, None
        if pager is not None and not self._lock.locked():
            pager.close()

    def _call(self, command: Command, timeout_seconds: float) -> Reply:
        fresh = self._pager is None
        pager = self._pager or Pager(str(self.path))
        self._pager = pager
        try:
            return pager.call(command, timeout_seconds)
        except NativeError as error:
            self._pager = None
            # The connection of a pager that was replaced meanwhile; its successor has not seen the command.
            if fresh or error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.ENOTCONN):
                raise
        finally:
            if self._pager is not pager:
                pager.close()
        return self._call(command, timeout_seconds)


def last_refusal(log: Path | None) -> dict[str, Any]:
    """The last line of a pager's log that tells of a refusal; empty when there is none."""
    if log is None:
        return {}
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL_BYTES))
            lines = file.read(LOG_TAIL_BYTES).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict) and found.get("event") == "refused":
                return found
    return {}


def rotate_log(path: Path) -> None:
    """Move a log that has grown large aside; one predecessor is kept."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > MAX_LOG_BYTES:
            os.replace(path, path.with_suffix(".log.1"))


def trim_log(path: Path) -> None:
    """Empty a log that a living pager has let grow beyond all measure; it appends, so it goes on at the start."""
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_size > 2 * MAX_LOG_BYTES:
            os.truncate(path, 0)
