# SPDX-License-Identifier: Apache-2.0
"""The local admin socket: one JSON line asks, one JSON line answers. For root and for the agent's own user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError

MAX_LINE_BYTES: Final = 64 * 1024
MAX_ANSWER_BYTES: Final = 16 * 2**20
MAX_CLIENTS: Final = 16
IDLE_SECONDS: Final = 30.0

_log: Final = structlog.stdlib.get_logger("frostline.agent.admin")


class AdminRequest(BaseModel):
    """What can be asked. ``vm`` is an id, UUID, name or pid."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    method: Literal["status", "drain", "detach", "resume", "release"]
    vm: str = Field(default="", max_length=512)


class AdminError(Exception):
    """The agent answered with an error, or could not be reached; ``code`` is a short word."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code: Final = code


Handler = Callable[[AdminRequest], Awaitable[dict[str, Any]]]


class AdminServer:
    """Serves ``handler`` on a unix socket that only its owner can connect to."""

    def __init__(self, path: Path, handler: Handler) -> None:
        self._path: Final = path
        self._handler: Final = handler
        self._server: asyncio.Server | None = None
        self._clients = 0

    async def start(self) -> None:
        """The run folder's lock is ours, so a socket that is there already was left by a dead agent."""
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(self._path.lstat().st_mode):
                self._path.unlink()
        old_umask = os.umask(0o177)
        try:
            self._server = await asyncio.start_unix_server(self._serve, str(self._path), limit=MAX_LINE_BYTES)
        finally:
            os.umask(old_umask)

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            refused: dict[str, Any] | None = None
            if self._clients > MAX_CLIENTS:
                refused = _error("busy", f"more than {MAX_CLIENTS} clients at once; try again")
            elif peer_uid(writer) not in (0, os.geteuid()):
                refused = _error("denied", "only root and the agent's own user may ask")
            while await self._one(reader, writer, refused) and refused is None:
                pass
        except (OSError, TimeoutError):
            return
        finally:
            self._clients -= 1
            writer.close()

    async def _one(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, refused: dict[str, Any] | None
    ) -> bool:
        """Answer one line; False when the client has left. A refusal waits for the question, or it would be lost."""
        async with asyncio.timeout(IDLE_SECONDS):
            try:
                line = await reader.readline()
            except ValueError:
                await _answer(writer, _error("invalid", f"a request is at most {MAX_LINE_BYTES} bytes"))
                return False
        if not line:
            return False
        if refused is not None:
            await _answer(writer, refused)
            return True
        try:
            request = AdminRequest.model_validate_json(line)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            await _answer(writer, _error("invalid", f"{'.'.join(map(str, first['loc']))}: {first['msg']}"))
            return True
        try:
            await _answer(writer, {"ok": True, **await self._handler(request)})
        except AdminError as error:
            await _answer(writer, _error(error.code, str(error)))
        return True


def peer_uid(writer: asyncio.StreamWriter) -> int:
    """The effective user at the other end of a unix socket."""
    peer: socket.socket = writer.get_extra_info("socket")
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _pid, uid, _gid = struct.unpack("3i", credentials)
    return int(uid)


async def ask(path: Path, request: AdminRequest, timeout_seconds: float = 10.0) -> dict[str, Any]:
    """Ask the agent at ``path``. Raises AdminError: ``unreachable`` when nobody answers."""
    try:
        async with asyncio.timeout(timeout_seconds):
            reader, writer = await asyncio.open_unix_connection(str(path), limit=MAX_ANSWER_BYTES)
            try:
                writer.write(request.model_dump_json().encode() + b"\n")
                await writer.drain()
                line = await reader.readline()
            finally:
                writer.close()
    except TimeoutError:
        raise AdminError("unreachable", f"no answer on {path} within {timeout_seconds:g} s") from None
    except OSError as error:
        raise AdminError(
            "unreachable", f"cannot reach an agent on {path}: {error.strerror}; is it running with this --run-dir?"
        ) from None
    answer = json.loads(line) if line else _error("unreachable", f"the agent on {path} closed the connection")
    if not isinstance(answer, dict) or not answer.get("ok"):
        raise AdminError(str(answer.get("code", "failed")), str(answer.get("message", "no message")))
    return answer


async def _answer(writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    writer.write(json.dumps(body, default=str).encode() + b"\n")
    async with asyncio.timeout(IDLE_SECONDS):
        await writer.drain()


def _error(code: str, message: str) -> dict[str, Any]:
    return {"ok": False, "code": code, "message": message}
