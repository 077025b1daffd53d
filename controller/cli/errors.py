# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between an operator and the controller, in words and exit codes.

Every error says four things: what was tried, on what, what the other side said, and what to do next.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
from google.rpc import error_details_pb2, status_pb2

from frostline.controller.cli.exits import Exit

_DETAILS_KEY: Final = "grpc-status-details-bin"
_EXIT_BY_CODE: Final[dict[grpc.StatusCode, Exit]] = {
    grpc.StatusCode.UNAVAILABLE: Exit.UNREACHABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED: Exit.UNREACHABLE,
    grpc.StatusCode.NOT_FOUND: Exit.NOT_FOUND,
    grpc.StatusCode.INVALID_ARGUMENT: Exit.REFUSED,
    grpc.StatusCode.FAILED_PRECONDITION: Exit.REFUSED,
    grpc.StatusCode.OUT_OF_RANGE: Exit.REFUSED,
    grpc.StatusCode.PERMISSION_DENIED: Exit.REFUSED,
    grpc.StatusCode.UNAUTHENTICATED: Exit.REFUSED,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Exit.REFUSED,
    grpc.StatusCode.UNIMPLEMENTED: Exit.REFUSED,
    grpc.StatusCode.ABORTED: Exit.CONFLICT,
    grpc.StatusCode.ALREADY_EXISTS: Exit.CONFLICT,
}
_WHAT_TO_DO: Final[dict[grpc.StatusCode, str]] = {
    grpc.StatusCode.UNAVAILABLE: "is frostline-controller running there? name another with --controller or "
    "FROSTLINE_CONTROLLER",
    grpc.StatusCode.DEADLINE_EXCEEDED: "it may be busy or hung: look at its log, or give it longer with --timeout",
    grpc.StatusCode.ABORTED: "`frostline policy list` shows what is in force now; look at it, then put yours again",
    grpc.StatusCode.ALREADY_EXISTS: "`frostline policy list` shows what is in force now",
    grpc.StatusCode.UNIMPLEMENTED: "that controller is older than this command; compare the versions",
}
STORE_TODO: Final = "nothing was changed and the last known policy stays in force; bring Redis back, then try again"


@dataclass(frozen=True)
class Violation:
    """One fault in a document: where it is, and what is wrong there."""

    place: str
    reason: str


class CliError(Exception):
    """An error with an exit code, ready to be shown."""

    def __init__(
        self,
        exit_code: Exit,
        tried: str,
        *,
        on: str = "",
        said: str = "",
        todo: str = "",
        violations: tuple[Violation, ...] = (),
    ) -> None:
        super().__init__(said or tried)
        self.exit_code = exit_code
        self.tried, self.on, self.said, self.todo, self.violations = tried, on, said, todo, violations

    def lines(self) -> list[str]:
        where = f" on {self.on}" if self.on else ""
        said = f": {self.said}" if self.said else ""
        lines = [f"cannot {self.tried}{where}{said}"]
        lines += [f"  {violation.place or 'document'}: {violation.reason}" for violation in self.violations]
        if self.todo:
            lines.append(f"  {self.todo}")
        return lines

    def as_json(self) -> dict[str, Any]:
        return {
            "error": {
                "exit_code": int(self.exit_code),
                "kind": self.exit_code.name.lower(),
                "tried": self.tried,
                "on": self.on,
                "said": self.said,
                "todo": self.todo,
                "violations": [{"place": v.place, "reason": v.reason} for v in self.violations],
            }
        }


def from_rpc(error: grpc.aio.AioRpcError, tried: str, on: str, *, not_found_todo: str = "") -> CliError:
    """An RPC's error in our words. UNAVAILABLE is taken for an unreachable controller; the caller knows better
    when the controller itself still answers (see OperatorClient)."""
    code = error.code()
    return CliError(
        _EXIT_BY_CODE.get(code, Exit.UNEXPECTED),
        tried,
        on=f"the controller at {on}",
        said=_said(error),
        todo=not_found_todo if code is grpc.StatusCode.NOT_FOUND else _WHAT_TO_DO.get(code, ""),
        violations=violations_of(error),
    )


def violations_of(error: grpc.aio.AioRpcError) -> tuple[Violation, ...]:
    """The field violations that a controller attached to INVALID_ARGUMENT; none when it attached none."""
    status = status_pb2.Status()
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                status.ParseFromString(value)
            except Exception:  # garbage from a peer: the plain message has to do
                return ()
    found: list[Violation] = []
    for detail in status.details:
        bad_request = error_details_pb2.BadRequest()
        if detail.Unpack(bad_request):
            found += [Violation(_place(v.field), v.description) for v in bad_request.field_violations[:100]]
    return tuple(found)


def _place(field: str) -> str:
    """The request's field as a place in the document, which is what its author knows."""
    return field.removeprefix("document").removeprefix(".") if field.split(".")[0] == "document" else field


def _said(error: grpc.aio.AioRpcError) -> str:
    details = (error.details() or "").strip()
    code = error.code()
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer in time"
    if code is grpc.StatusCode.UNAVAILABLE and "; last error: " in details:
        # gRPC repeats itself: keep the part that names the system's error.
        return details.rsplit(": ", 1)[-1]
    return details or code.name.lower().replace("_", " ")
