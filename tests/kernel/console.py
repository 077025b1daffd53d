# SPDX-License-Identifier: Apache-2.0
"""The kernel's console: kept whole in a file, and watched for what a healthy kernel never says."""

import re
import socket
import threading
from collections import deque
from pathlib import Path

_LINES_KEPT = 80
# Beginnings of the reports that lib/bug.c, the oops code, lockdep and the various watchdogs make.
_TROUBLE = re.compile(
    r"Kernel panic|\bOops\b|\bBUG: |\bWARNING: |-\[ cut here \]-|general protection fault|unable to handle|"
    r"blocked for more than|soft lockup|hard LOCKUP|rcu.*detected stall|Out of memory: Killed"
)


class KernelConsole:
    """Reads in a thread of its own."""

    def __init__(self, connection: socket.socket, log: Path) -> None:
        self._connection = connection
        self._log = log
        self._lock = threading.Lock()
        self._lines: deque[str] = deque(maxlen=_LINES_KEPT)
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._read, name="kernel-console", daemon=True)
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
                for line in lines:
                    self._take(line.decode(errors="replace").rstrip())
        if pending:
            self._take(pending.decode(errors="replace").rstrip())

    def _take(self, line: str) -> None:
        with self._lock:
            self._lines.append(line)
            if self._trouble is None and _TROUBLE.search(line):
                self._trouble = line.strip()

    def trouble(self) -> str | None:
        """The first line that told of trouble; it stays."""
        with self._lock:
            return self._trouble

    def tail(self) -> str:
        """The last lines, for the text of a failure."""
        with self._lock:
            return "\n".join("  | " + line for line in self._lines)

    def wait_for_end(self, timeout_seconds: float) -> None:
        """Until all has been read that a QEMU that has ended had written."""
        self._thread.join(timeout_seconds)

    def close(self) -> None:
        self._connection.close()
        self._thread.join(timeout=5)
