# SPDX-License-Identifier: Apache-2.0
"""SessionService: from a new connection to a running Stream."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio
import structlog

from frostline.controller.api.status import StatusError, abort, bad_request, retry_later
from frostline.controller.fleet.fleet import MAX_HOSTS
from frostline.controller.fleet.records import HostRecord
from frostline.controller.session.hub import Hub
from frostline.controller.session.stream import WRITE_SECONDS, Context, Stream, read
from frostline.controller.session.validate import MAX_VMS, InvalidError, check_hello
from frostline.v1 import session_pb2 as wire
from frostline.v1 import session_pb2_grpc as rpc

_log = structlog.get_logger(__name__)


class SessionService(rpc.SessionServiceServicer):
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    async def Session(self, _requests: object, context: Context) -> None:  # type: ignore[override]  # noqa: N802
        """Runs for as long as the agent stays."""
        host: HostRecord | None = None
        code = "OK"
        try:
            hello = await self._hello(context)
            host, stream = await self._open(hello, context)
            try:
                await stream.run()
            finally:
                self._leave(host, stream)
        except StatusError as error:
            code = error.code.name
            peer = host.node_id if host is not None else context.peer()
            _log.warning("session ended", node_id=peer, code=code, why=error.text)
            await abort(context, error)
        except asyncio.CancelledError:
            code = "CANCELLED"
            raise
        finally:
            self._hub.decider.metrics.count("session.closed", code=code)

    async def _hello(self, context: Context) -> wire.Hello:
        if self._hub.closing:
            raise StatusError(grpc.StatusCode.UNAVAILABLE, "the controller is stopping; try again")
        limit = self._hub.timing.hello_seconds
        try:
            async with asyncio.timeout(limit):
                request = await read(context)
        except TimeoutError:
            self._refused("no_hello")
            raise bad_request(f"no hello within {limit:g} s", [("hello", "must be the first message")]) from None
        if request is None or request.WhichOneof("message") != "hello":
            self._refused("no_hello")
            said = "nothing" if request is None else request.WhichOneof("message") or "an empty message"
            raise bad_request(f"the stream began with {said}", [("hello", "must be the first message")])
        hello: wire.Hello = request.hello
        # Only now: a refusal that meets the hello under way costs the agent the reason and when to come back (its write
        # fails first), and those who say nothing must not use up what agents need.
        wait_seconds = self._hub.streams.take(time.monotonic())
        if wait_seconds > 0.0:
            self._refused("rate")
            text = f"more than {self._hub.timing.streams_per_second:g} new sessions a second; try again later"
            # Spread the ones that were turned away instead of meeting them all again at once.
            raise retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, text, max(wait_seconds, 1.0))
        try:
            check_hello(hello, self._hub.epoch)
        except InvalidError as error:
            self._refused("invalid")
            raise bad_request(f"hello refused: {error}", error.problems) from None
        return hello

    async def _open(self, hello: wire.Hello, context: Context) -> tuple[HostRecord, Stream]:
        hub, node_id = self._hub, hello.node_id
        known = hub.fleet.hosts.get(node_id)
        other = known.session if known is not None else None
        pushes_out = isinstance(other, Stream) and other.instance != hello.agent_instance
        wait_seconds, words = hub.flaps.admit(node_id, pushes_out, time.monotonic())
        if wait_seconds > 0.0:
            self._refused("flapping")
            if known is not None:
                # Longer than the wait: it comes back, and must not be forgotten between two of its tries.
                known.refused_hello = words
                known.refused_hello_until = time.monotonic() + wait_seconds + hub.flaps.window_seconds
            raise retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, words, wait_seconds)
        if known is None and len(hub.fleet.hosts) >= MAX_HOSTS:
            self._refused("full")
            text = f"{MAX_HOSTS} hosts are known already; start another controller for more"
            raise retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, text, 60.0)
        await hub.raise_epoch(hello.highest_epoch, node_id)
        # Looked up again: another hello may have come while the epoch was raised.
        host = hub.fleet.hosts.get(node_id)
        if host is None:
            host = hub.fleet.hosts[node_id] = HostRecord(node_id=node_id)
        if host.session is not None:
            host.session.close("ABORTED", f"a newer session of {node_id!r} from {context.peer()} took over")
        stream = Stream(hub, host, context, hello.agent_instance)
        self._take_hello(host, hello)
        host.session = stream
        timing = hub.timing
        welcome = wire.Welcome(
            epoch=hub.epoch,
            heartbeat_seconds=timing.heartbeat_seconds,
            report_seconds=timing.report_seconds,
            controller_id=hub.controller_id,
        )
        try:
            async with asyncio.timeout(WRITE_SECONDS):
                await context.write(wire.SessionResponse(welcome=welcome))
        except BaseException as error:
            self._leave(host, stream)
            if isinstance(error, asyncio.TimeoutError):
                raise StatusError(grpc.StatusCode.ABORTED, "the agent did not take the welcome") from None
            raise
        hub.decider.metrics.count("session.opened")
        _log.info(
            "session opened",
            node_id=node_id,
            peer=context.peer(),
            agent_version=hello.agent_version,
            vms=len(hello.vms),
            applied_version=hello.applied_version,
        )
        return host, stream

    def _take_hello(self, host: HostRecord, hello: wire.Hello) -> None:
        host.agent_version, host.boot_id = hello.agent_version, hello.boot_id
        host.host_memory_bytes = hello.host_memory_bytes
        host.host_available_bytes = hello.host_available_bytes
        host.last_seen = time.monotonic()
        # Versions grow for a host whatever became of the controller that gave out the last one.
        host.version_desired = max(host.version_desired, hello.applied_version)
        host.version_applied = hello.applied_version
        host.refused_report = ""
        here = {identity.vm_id for identity in hello.vms}
        for vm_id in host.vms.keys() - here:
            del host.vms[vm_id]
        for identity in list(hello.vms)[:MAX_VMS]:
            self._hub.take_identity(host, identity)
        self._hub.fleet.touch(host)

    def _leave(self, host: HostRecord, stream: Stream) -> None:
        if host.session is stream:
            host.session = None
            self._hub.fleet.touch(host)

    def _refused(self, reason: str) -> None:
        self._hub.decider.metrics.count("session.refused", reason=reason)
