# SPDX-License-Identifier: Apache-2.0
"""gRPC errors with google.rpc details: what is wrong where, and when to come back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

# HTTP/2 headers carry the details; peers commonly take 8 KiB of them.
_MAX_TEXT = 1500
_MAX_VIOLATIONS = 24

Context = grpc.aio.ServicerContext[Any, Any]


class StatusError(Exception):
    """An answer that is an error. Raised anywhere below a handler, sent by `abort`."""

    def __init__(self, code: grpc.StatusCode, text: str, *details: Message) -> None:
        super().__init__(text)
        self.code = code
        self.text = text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
        self.details = details


def bad_request(text: str, violations: Iterable[tuple[str, str]] = ()) -> StatusError:
    """INVALID_ARGUMENT with a BadRequest that names every field."""
    listed = list(violations)
    detail = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=field[:128], description=why[:256])
            for field, why in listed[:_MAX_VIOLATIONS]
        ]
    )
    if len(listed) > _MAX_VIOLATIONS:
        text += f" (and {len(listed) - _MAX_VIOLATIONS} more)"
    return StatusError(grpc.StatusCode.INVALID_ARGUMENT, text, detail)


def retry_later(code: grpc.StatusCode, text: str, seconds: float) -> StatusError:
    """An error with RetryInfo."""
    delay = duration_pb2.Duration()
    delay.FromNanoseconds(int(seconds * 1e9))
    return StatusError(code, text, error_details_pb2.RetryInfo(retry_delay=delay))


def not_found(text: str) -> StatusError:
    return StatusError(grpc.StatusCode.NOT_FOUND, text)


async def abort(context: Context, error: StatusError) -> NoReturn:
    """End the call with the error and its details."""
    details = []
    for message in error.details:
        packed = any_pb2.Any()
        packed.Pack(message)
        details.append(packed)
    number: int = error.code.value[0]
    status = rpc_status.to_status(
        status_pb2.Status(code=code_pb2.Code.ValueType(number), message=error.text, details=details)
    )
    await context.abort(status.code, status.details, status.trailing_metadata)
    raise AssertionError("abort returned")
