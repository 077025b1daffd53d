# SPDX-License-Identifier: Apache-2.0
"""As much of QEMU's machine protocol as the tests need: one command at a time, over a connected socket."""

import json
import socket
import threading
import time
from typing import Any

from .errors import GuestError

_MESSAGE_LIMIT_BYTES = 16 << 20


class QmpClient:
    """Speaks QMP; the caller's socket becomes this object's."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._pending = b""
        self._lock = threading.Lock()
        self._ready = False
        self._number = 0

    def close(self) -> None:
        self._connection.close()

    def _receive(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no answer in time")
            self._connection.settimeout(left)
            received = self._connection.recv(1 << 16)
            if not received:
                raise ConnectionError("QEMU closed the connection")
            self._pending += received
            if len(self._pending) > _MESSAGE_LIMIT_BYTES:
                raise GuestError(f"QMP: a message of more than {_MESSAGE_LIMIT_BYTES} bytes")
        line, _, self._pending = self._pending.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def _call(self, command: str, arguments: dict[str, Any], deadline: float) -> Any:
        self._number += 1
        request = json.dumps({"execute": command, "arguments": arguments, "id": self._number}).encode() + b"\n"
        self._connection.settimeout(max(0.01, deadline - time.monotonic()))
        self._connection.sendall(request)
        while True:
            message = self._receive(deadline)
            if message.get("id") != self._number:
                continue  # an event, or the answer to a command that was given up
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise GuestError(f"QMP {command} {arguments}: {message['error'].get('desc')}")

    def execute(self, command: str, timeout_seconds: float = 10, **arguments: Any) -> Any:
        """Run one command and return its result. Raises GuestError with QEMU's own words, or on time-out."""
        deadline = time.monotonic() + timeout_seconds
        with self._lock:
            try:
                if not self._ready:
                    self._receive(deadline)  # the greeting
                    self._call("qmp_capabilities", {}, deadline)
                    self._ready = True
                return self._call(command, {key.replace("_", "-"): value for key, value in arguments.items()}, deadline)
            except (OSError, ValueError) as error:
                raise GuestError(f"QMP {command}: {error} (limit {timeout_seconds:g} s)") from error
