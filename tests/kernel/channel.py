# SPDX-License-Identifier: Apache-2.0
"""The host's end of the port over which the guest's init is told what to run. The form is in init/frame.h."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from tests.system.guest.errors import GuestError

from .result import Result

_HEADER = struct.Struct("<III")
_REQUEST = struct.Struct("<IIIII")
_END = struct.Struct("<iII")
_RUN, _SIGNAL, _KILL, _OFF = 1, 2, 3, 4
_READY, _OUT, _ERR, _EXIT, _REFUSED = 16, 17, 18, 19, 20
_FRAME_LIMIT_BYTES = 64 << 20
_OUTPUT_LIMIT_BYTES = 256 << 20
# How much later than the guest the host gives up: the guest says where a command hangs, and needs time to kill it.
_GRACE_SECONDS = 40.0


class Running:
    """A command under way inside the guest. All methods from any thread."""

    def __init__(self, channel: "Channel", number: int, command: tuple[str, ...], limit_seconds: float) -> None:
        self._channel = channel
        self.number = number
        self.command = command
        self._limit_seconds = limit_seconds
        self._start = time.monotonic()
        self._end: tuple[int, bool, bool] | None = None
        self._seconds = 0.0
        self._output = {_OUT: bytearray(), _ERR: bytearray()}
        self._refusal: str | None = None

    def take(self, kind: int, payload: bytes) -> None:
        """A frame of this command's; the channel's lock is held."""
        if kind in self._output:
            room = _OUTPUT_LIMIT_BYTES - len(self._output[kind])
            self._output[kind] += payload[: max(0, room)]
        elif kind == _EXIT:
            code, over_limit, unkillable = _END.unpack(payload)
            self._end = (code, bool(over_limit), bool(unkillable))
            self._seconds = time.monotonic() - self._start
        elif kind == _REFUSED:
            self._refusal = payload.decode(errors="replace")

    @property
    def ended(self) -> bool:
        return self._end is not None or self._refusal is not None

    def stdout(self) -> str:
        """What it has written so far."""
        with self._channel.changed:
            return self._output[_OUT].decode(errors="replace")

    def stderr(self) -> str:
        with self._channel.changed:
            return self._output[_ERR].decode(errors="replace")

    def signal(self, number: int) -> None:
        """Send a signal to its first process (only: what that has started lives on)."""
        self._channel.send(_SIGNAL, self.number, struct.pack("<I", number))

    def kill(self) -> None:
        """SIGKILL to all its processes."""
        self._channel.send(_KILL, self.number, b"")

    def wait_for(self, ready: Callable[[], bool], timeout_seconds: float, what: str) -> None:
        """Wait until ``ready()``, looked at after each piece of output. GuestError if the command ends before."""
        if not self._channel.wait(lambda: ready() or self.ended, timeout_seconds) or not ready():
            raise GuestError(f"{' '.join(self.command)}: no {what}; {self._so_far()}")

    def _so_far(self) -> str:
        state = "was running" if not self.ended else f"ended: {self._end or self._refusal}"
        return f"it {state}\n--- stdout\n{self.stdout()[-3000:]}\n--- stderr\n{self.stderr()[-3000:]}"

    def wait(self) -> Result:
        """Wait for its end, which its limit makes certain. GuestError when the guest itself no longer answers."""
        left = self._start + self._limit_seconds + _GRACE_SECONDS - time.monotonic()
        if not self._channel.wait(lambda: self.ended, max(0.1, left)):
            gone = "the guest is gone" if self._channel.closed else "the guest does not answer any more"
            raise GuestError(f"{' '.join(self.command)}: {gone}; {self._so_far()}")
        if self._refusal is not None:
            raise GuestError(f"{' '.join(self.command)}: not begun: {self._refusal}")
        assert self._end is not None
        code, over_limit, unkillable = self._end
        with self._channel.changed:
            out, err = (bytes(self._output[kind]) for kind in (_OUT, _ERR))
        result = Result(self.command, code, out, err, self._seconds, over_limit)
        if unkillable:
            raise GuestError(f"it cannot even be killed: {result.describe()}")
        return result


class Channel:
    """Reads in a thread of its own."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.changed = threading.Condition()
        self._sending = threading.Lock()
        self._running: dict[int, Running] = {}
        self._numbers = 0
        self.ready_text: str | None = None
        self.closed = False
        self._thread = threading.Thread(target=self._read, name="kernel-channel", daemon=True)
        self._thread.start()

    def _receive(self, wanted: int) -> bytes:
        received = bytearray()
        while len(received) < wanted:
            piece = self._connection.recv(min(wanted - len(received), 1 << 20))
            if not piece:
                raise ConnectionError("closed")
            received += piece
        return bytes(received)

    def _read(self) -> None:
        try:
            while True:
                kind, number, size = _HEADER.unpack(self._receive(_HEADER.size))
                if size > _FRAME_LIMIT_BYTES:
                    raise ConnectionError(f"a frame of {size} bytes")
                payload = self._receive(size)
                with self.changed:
                    if kind == _READY:
                        self.ready_text = payload.decode(errors="replace")
                    elif number in self._running:
                        self._running[number].take(kind, payload)
                    self.changed.notify_all()
        except OSError:
            with self.changed:
                self.closed = True
                self.changed.notify_all()

    def wait(self, ready: Callable[[], bool], timeout_seconds: float) -> bool:
        """Wait until ``ready()``. False when time is up or the guest is gone."""
        deadline = time.monotonic() + timeout_seconds
        with self.changed:
            while not ready():
                left = deadline - time.monotonic()
                if left <= 0 or self.closed:
                    return False
                self.changed.wait(left)
            return True

    def send(self, kind: int, number: int, payload: bytes) -> None:
        try:
            with self._sending:
                self._connection.sendall(_HEADER.pack(kind, number, len(payload)) + payload)
        except OSError as error:
            raise GuestError(f"the guest is gone: {error}") from error

    def start(
        self,
        command: Sequence[str],
        limit_seconds: float,
        environment: Mapping[str, str],
        stdin: bytes,
        keep_children: bool,
    ) -> Running:
        strings = [*command, *(f"{name}={value}" for name, value in environment.items())]
        payload = _REQUEST.pack(
            int(limit_seconds * 1000), int(keep_children), len(command), len(environment), len(stdin)
        )
        payload += b"".join(text.encode() + b"\0" for text in strings) + stdin
        if len(payload) > _FRAME_LIMIT_BYTES:
            raise GuestError(f"{command[0]}: {len(payload)} bytes of input; the limit is {_FRAME_LIMIT_BYTES}")
        with self.changed:
            self._numbers += 1
            running = Running(self, self._numbers, tuple(command), limit_seconds)
            self._running[running.number] = running
        self.send(_RUN, running.number, payload)
        return running

    def power_off(self) -> None:
        with contextlib.suppress(GuestError):
            self.send(_OFF, 0, b"")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._thread.join(timeout=5)
        self._connection.close()
