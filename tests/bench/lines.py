# SPDX-License-Identifier: Apache-2.0
"""A child process that answers lines with lines, with a time limit on every answer."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Final

from tests.bench.errors import BenchError

END_SECONDS: Final = 10.0


def dies_with_us() -> None:
    """For ``preexec_fn``: the child is ended should the bench be killed."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def pinned_to(cpu: int) -> Callable[[], None]:
    """For ``preexec_fn``: the child runs on one CPU, below 0 on any."""
    return lambda: os.sched_setaffinity(0, {cpu}) if cpu >= 0 else None


class LineProcess:
    """A program on two pipes. Ends by end of file on its standard input, and is killed if that does not do."""

    def __init__(self, command: Sequence[str], *, new_session: bool = False) -> None:
        self.name: Final = os.path.basename(command[0])
        self._process: Final = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=new_session
        )
        self._buffer = b""

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            os.write(self._process.stdin.fileno(), line.encode() + b"\n")
        except BrokenPipeError as error:
            raise BenchError(f"{self.name} (pid {self.pid}) has ended; its message is above") from error

    def line(self, timeout_seconds: float = 60.0) -> str:
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._buffer:
            self._read_more(deadline)
        line, self._buffer = self._buffer.split(b"\n", 1)
        return line.decode()

    def exactly(self, count: int, timeout_seconds: float = 60.0) -> bytes:
        """The next ``count`` bytes."""
        deadline = time.monotonic() + timeout_seconds
        while len(self._buffer) < count:
            self._read_more(deadline)
        found, self._buffer = self._buffer[:count], self._buffer[count:]
        return found

    def ask(self, line: str, timeout_seconds: float = 60.0) -> list[int]:
        """Send a line and give the decimal numbers of the answer."""
        self.send(line)
        return [int(word) for word in self.line(timeout_seconds).split()]

    def close(self, timeout_seconds: float = END_SECONDS) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(END_SECONDS)
        self._process.stdout.close()

    def _read_more(self, deadline: float) -> None:
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise BenchError(f"{self.name} (pid {self.pid}) did not answer in time")
        more = os.read(descriptor, 1 << 20)
        if not more:
            raise BenchError(f"{self.name} (pid {self.pid}) has ended; its message is above")
        self._buffer += more
