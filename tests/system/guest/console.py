# SPDX-License-Identifier: Apache-2.0
"""The host's end of the guest's serial console: keeps every line, and the latest of what the workload said."""

import contextlib
import json
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from .errors import GuestError

_LINES_KEPT = 60
_EVENTS_KEPT = 1000
_LINE_LIMIT_BYTES = 1 << 16


@dataclass(frozen=True)
class Status:
    """The workload's latest status line."""

    round: int
    filled_pages: int
    checked_pages: int
    writes: int
    errors: int
    phase: str
    jobs_done: int
    fill_ms: int
    verify_ms: int
    slowest_us: int
    writers: int
    rate: int
    uptime_s: int
    mem_total_kib: int
    mem_free_kib: int

    @property
    def filled_bytes(self) -> int:
        return self.filled_pages * 4096


_STATUS_FIELDS = {item.name for item in fields(Status)}


class Console:
    """Reads the serial line in a thread of its own; all else may be called from any thread."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self._connection = connection
        self._changed = threading.Condition()
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._events: deque[dict[str, Any]] = deque(maxlen=_EVENTS_KEPT)
        self._status: Status | None = None
        self._closed = False
        self._log = log
        self._thread = threading.Thread(target=self._read, name="guest-console", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        pending = b""
        with self._log.open("ab", buffering=0) as log:
            while True:
                try:
                    received = self._connection.recv(1 << 16)
                except OSError:
                    received = b""
                if not received:
                    break
                log.write(received)
                *lines, pending = (pending + received).split(b"\n")
                pending = pending[-_LINE_LIMIT_BYTES:]
                for line in lines:
                    self._take(line.decode(errors="replace").strip())
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _take(self, line: str) -> None:
        try:
            said = json.loads(line) if line.startswith("{") else None
        except ValueError:
            said = None  # the kernel spoke in the middle of a line; the next status comes soon
        with self._changed:
            if isinstance(said, dict) and said.keys() == _STATUS_FIELDS:
                self._status = Status(**said)
            else:
                self._lines.append(line)
                if isinstance(said, dict) and "event" in said:
                    self._events.append(said)
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        """Whether QEMU has closed its end."""
        with self._changed:
            return self._closed

    def status(self) -> Status | None:
        with self._changed:
            return self._status

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the workload said beside its status ("error", "booted", "refused", ...), oldest first."""
        with self._changed:
            return [event for event in self._events if kind in (None, event["event"])]

    def last_lines(self) -> str:
        """The last lines that were no status, for the text of an error; a status at the end."""
        with self._changed:
            return "\n".join(["  | " + line for line in self._lines] + [f"  | {self._status}"])

    def wait(self, ready: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait until ``ready()``, looked at after each line. False when time is up or the console is closed."""
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            while not ready():
                left = deadline - time.monotonic()
                if left <= 0 or self._closed:
                    return False
                self._changed.wait(left)
            return True

    def send(self, line: str) -> None:
        """Send one command line."""
        try:
            # A command is far smaller than the socket's buffer: full means that QEMU reads no more.
            self._connection.send(line.encode() + b"\n", socket.MSG_DONTWAIT)
        except OSError as error:
            raise GuestError(f"cannot send {line!r} to the guest's console: {error}\n{self.last_lines()}") from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # QEMU may have gone first
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5)
        self._connection.close()
