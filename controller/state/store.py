# SPDX-License-Identifier: Apache-2.0
"""Redis, with its ways to fail told apart. Nothing here retries: callers know what waiting would cost."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, TypeVar

import redis.asyncio as redis
import structlog
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from frostline.controller.state import scripts
from frostline.controller.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)
_T = TypeVar("_T")

CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 3.0


class Failure(enum.Enum):
    AWAY = "away"
    FULL = "full"
    READ_ONLY = "read_only"
    OTHER = "other"


class StoreError(Exception):
    """An operation that failed, and why, in words for people."""

    def __init__(self, failure: Failure, text: str) -> None:
        super().__init__(text)
        self.failure = failure


def _explain(error: Exception, url: str) -> StoreError:
    said = str(error).strip() or type(error).__name__
    if isinstance(error, exceptions.OutOfMemoryError) or said.startswith("OOM"):
        text = f"Redis at {url} is full ({said}); raise its maxmemory or free some"
        return StoreError(Failure.FULL, text)
    if "MISCONF" in said or "No space left" in said:
        return StoreError(Failure.FULL, f"Redis at {url} cannot write to its disk ({said})")
    if isinstance(error, exceptions.ReadOnlyError) or "READONLY" in said:
        return StoreError(Failure.READ_ONLY, f"Redis at {url} is a read-only replica; give the address of the primary")
    if isinstance(error, (exceptions.AuthenticationError, exceptions.NoPermissionError)) or "authenticate" in said:
        return StoreError(
            Failure.AWAY, f"Redis at {url} does not let us in ({said}); check the user and password in its URL"
        )
    if isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError, OSError, asyncio.TimeoutError)):
        return StoreError(Failure.AWAY, f"Redis at {url} does not answer ({said}); it is tried again all the time")
    return StoreError(Failure.OTHER, f"Redis at {url} refused: {said}")


class Store:
    """A connection pool to one Redis, and what its state is."""

    def __init__(self, url: str, metrics: Metrics) -> None:
        self.url = _without_password(url)
        self.reads = False
        self.writes = False
        self.problem = "not connected yet"
        self._metrics = metrics
        self._client: redis.Redis = redis.Redis.from_url(
            url,
            decode_responses=True,
            encoding_errors="replace",
            socket_connect_timeout=CONNECT_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            max_connections=16,
            retry=Retry(NoBackoff(), 0),
        )
        self._reconcile = self._client.register_script(scripts.RECONCILE)
        self._put_policy = self._client.register_script(scripts.PUT_POLICY)
        self._put_back_policy = self._client.register_script(scripts.PUT_BACK_POLICY)

    @property
    def available(self) -> bool:
        return self.reads and self.writes

    async def close(self) -> None:
        await self._client.aclose()

    async def reconcile(self, my_id: str, epoch: int, above: int) -> tuple[str, bool, int, int, dict[str, str]]:
        """(marker, whether nothing was there, our epoch from now on, policy version stored, freezes stored)."""
        arguments: list[Any] = [my_id, epoch, above]
        keys = [scripts.MARKER, scripts.EPOCH, scripts.POLICY_CURRENT, scripts.FREEZES]
        marker, fresh, mine, current, flat = await self._do(lambda: self._reconcile(keys, arguments))
        return str(marker), bool(int(fresh)), int(mine), _to_int(current), dict(zip(flat[::2], flat[1::2], strict=True))

    async def put_policy(
        self, in_force: int, expected: int, document: str, author: str, comment: str, at_ns: int
    ) -> tuple[bool, int] | None:
        """
        (True, new version), or (False, version in force) when that is not the expected one.

        None when Redis holds less than the version in force: it has lost its data, and nothing was written.
        """
        arguments: list[Any] = [expected, scripts.POLICY_DOCUMENT, document, author, comment, at_ns]
        arguments += [scripts.MAX_POLICIES, scripts.MAX_AUDIT, in_force]
        keys = [scripts.POLICY_CURRENT, scripts.AUDIT]
        done, version = await self._do(lambda: self._put_policy(keys, arguments), write=True)
        return None if int(done) < 0 else (bool(int(done)), int(version))

    async def put_back_policy(self, version: int, fields: Mapping[str, str]) -> int:
        """Restore a document under its number; the version in force afterwards, a newer one if there is one."""
        arguments: list[Any] = [version, scripts.POLICY_DOCUMENT, *(fields.get(name, "") for name in _POLICY_FIELDS)]
        result = await self._do(lambda: self._put_back_policy([scripts.POLICY_CURRENT], arguments), write=True)
        return int(result)

    async def get_policy(self, version: int) -> dict[str, str]:
        """Fields of a version, empty when there is none."""
        found: dict[str, str] = await self._do(lambda: self._client.hgetall(f"{scripts.POLICY_DOCUMENT}{version}"))
        return found

    async def list_policies(self, versions: Sequence[int]) -> list[tuple[int, dict[str, str]]]:
        """Author, comment and time of those versions that are still kept."""

        async def ask() -> list[Any]:
            pipe = self._client.pipeline(transaction=False)
            for version in versions:
                pipe.hmget(f"{scripts.POLICY_DOCUMENT}{version}", ["author", "comment", "created_at_unix_ns"])
            result: list[Any] = await pipe.execute()
            return result

        rows = await self._do(ask)
        names = ("author", "comment", "created_at_unix_ns")
        return [
            (version, dict(zip(names, row, strict=True)))
            for version, row in zip(versions, rows, strict=True)
            if row[2] is not None
        ]

    async def put_freezes(self, flags: Mapping[str, str]) -> None:
        mapping: dict[Any, Any] = dict(flags)
        if mapping:
            await self._do(lambda: self._client.hset(scripts.FREEZES, mapping=mapping), write=True)

    async def drop_freeze(self, key: str) -> None:
        await self._do(lambda: self._client.hdel(scripts.FREEZES, key), write=True)

    async def audit(self, action: str, author: str, fields: Mapping[str, str]) -> None:
        entry: dict[Any, Any] = {"action": action, "author": author, **fields}
        await self._do(
            lambda: self._client.xadd(scripts.AUDIT, entry, maxlen=scripts.MAX_AUDIT, approximate=True), write=True
        )

    async def write_batch(self, build: Callable[[Any], None]) -> None:
        """Run what `build` puts on a pipeline. Nothing is undone when a part fails; the first failure is raised."""

        async def run() -> list[Any]:
            pipe = self._client.pipeline(transaction=False)
            build(pipe)
            result: list[Any] = await pipe.execute(raise_on_error=True)
            return result

        await self._do(run, write=True)

    async def _do(self, operation: Callable[[], Awaitable[Any]], write: bool = False) -> Any:
        try:
            # The client's own limits are per read; a server that trickles would get around them.
            async with asyncio.timeout(CONNECT_SECONDS + ANSWER_SECONDS):
                result = await operation()
        except (TimeoutError, exceptions.RedisError, OSError) as error:
            failed = _explain(error, self.url)
            self._metrics.count("store.errors", kind=failed.failure.value)
            self._note(failed)
            raise failed from error
        if not self.reads:
            self.reads = True
        if write and not self.writes:
            self.writes = True
            self.problem = ""
            _log.info("Redis takes writes", url=self.url)
        return result

    def _note(self, failed: StoreError) -> None:
        """Say it once per change, not once per try."""
        reads = failed.failure is not Failure.AWAY
        writes = self.writes and failed.failure is Failure.OTHER
        if (reads, writes, failed.failure.value) != (self.reads, self.writes, self.problem.partition(":")[0]):
            _log.error("state store in trouble", why=str(failed), consequence=_CONSEQUENCE)
        self.reads, self.writes = reads, writes
        self.problem = f"{failed.failure.value}: {failed}"


_POLICY_FIELDS = ("document", "author", "comment", "created_at_unix_ns")
_CONSEQUENCE = "the last known policy stays in force; policies cannot be changed and decisions are not kept"


def _to_int(text: str) -> int:
    try:
        return max(int(text), 0)
    except ValueError:
        return 0


def _without_password(url: str) -> str:
    scheme, mark, rest = url.partition("://")
    _, at, where = rest.rpartition("@")
    return f"{scheme}{mark}{where}" if at else url
