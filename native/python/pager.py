# SPDX-License-Identifier: Apache-2.0
"""Commands to a pager over its local socket. Calls block up to their time limit: make them off the event loop."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from frostline.native.binding import check, ffi, lib, text
from frostline.native.constants import ABI, CommandKind, State


@dataclass(frozen=True, slots=True)
class Command:
    """``struct fl_command``. A budget's lease counts from its arrival; a lease of 0 revokes."""

    kind: CommandKind
    budget_bytes: int = 0
    rate_bytes: int = 0
    lease_ns: int = 0
    generation: int = 0
    first_page: int = 0
    page_count: int = 0
    min_age_ns: int = 0
    scan_interval_ms: int = 0


@dataclass(frozen=True, slots=True)
class Reply:
    """The pager's answer; ``error`` is 0 or a positive errno."""

    error: int
    state: State
    pager_pid: int
    evicted_pages: int
    detail: str


class Pager:
    """A connection to one pager. One call at a time."""

    def __init__(self, socket_path: str) -> None:
        """Raises NativeError when nobody answers there, or another user does."""
        out = ffi.new("struct fl_pager **")
        check(lib.fl_pager_connect(socket_path.encode(), out), f"cannot connect to the pager at {socket_path}")
        self.socket_path: Final = socket_path
        self._pager: Any = out[0]

    def close(self) -> None:
        if self._pager is not None:
            lib.fl_pager_close(self._pager)
            self._pager = None

    def __enter__(self) -> Pager:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def call(self, command: Command, timeout_seconds: float = 2.0) -> Reply:
        """Send one command and wait for its answer. Raises NativeError (ETIMEDOUT, EPIPE, ...) for the transport."""
        if self._pager is None:
            raise ValueError(f"the connection to {self.socket_path} is closed")
        out = ffi.new("struct fl_reply *")
        raw = ffi.new(
            "struct fl_command *",
            {
                "abi": ABI,
                "kind": int(command.kind),
                "budget_bytes": command.budget_bytes,
                "rate_bytes": command.rate_bytes,
                "lease_ns": command.lease_ns,
                "generation": command.generation,
                "first_page": command.first_page,
                "page_count": command.page_count,
                "min_age_ns": command.min_age_ns,
                "scan_interval_ms": command.scan_interval_ms,
            },
        )
        check(
            lib.fl_pager_call(self._pager, raw, out, int(timeout_seconds * 1000)),
            f"no answer to {command.kind.name} from the pager at {self.socket_path}",
        )
        return Reply(
            error=-out.error,
            state=State(out.state),
            pager_pid=out.pager_pid,
            evicted_pages=out.evicted_pages,
            detail=text(out.detail),
        )
