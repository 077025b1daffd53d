# SPDX-License-Identifier: Apache-2.0
"""Freeze, unfreeze and drain.

What makes things safer works at once, whether Redis answers or not, and is written when it does. What loosens
something needs Redis first: otherwise a restart would take it back without anybody knowing.
"""

from __future__ import annotations

import asyncio
import time

import grpc
import structlog

from frostline.controller.api.author import author_of, checked_text
from frostline.controller.api.status import Context, StatusError, bad_request, not_found
from frostline.controller.fleet.fleet import Fleet
from frostline.controller.fleet.freezes import FLEET, host_key, vm_key
from frostline.controller.fleet.records import HostRecord, VmRecord
from frostline.controller.session.hub import Hub
from frostline.controller.state.keeper import Keeper
from frostline.controller.state.store import Store, StoreError
from frostline.v1 import operator_pb2 as op
from frostline.v1 import session_pb2 as wire

_log = structlog.get_logger(__name__)

POLL_SECONDS = 0.1
REFRESH_SECONDS = 1.0
# Answer this long before the caller's deadline, so that it gets the numbers and not just a timeout.
DEADLINE_MARGIN_SECONDS = 0.5
MAX_WAIT_SECONDS = 600.0


class Changes:
    def __init__(self, fleet: Fleet, hub: Hub, store: Store, keeper: Keeper) -> None:
        self._fleet = fleet
        self._hub = hub
        self._store = store
        self._keeper = keeper

    async def freeze(self, request: op.FreezeRequest, context: Context) -> op.FreezeResponse:
        author, why = author_of(context), checked_text("why", request.why)
        key, hosts = self._target(request.node_id, request.vm, must_exist=True)
        self._fleet.freezes.put(key, why, author)
        _log.warning("frozen", what=key, author=author, why=why)
        told = self._wake(hosts)
        await self._save("freeze", author, key, why)
        return op.FreezeResponse(hosts=told)

    async def unfreeze(self, request: op.UnfreezeRequest, context: Context) -> op.UnfreezeResponse:
        author = author_of(context)
        key, hosts = self._target(request.node_id, request.vm, must_exist=False)
        if self._fleet.freezes.get(key) is None:
            covering = "the fleet is" if self._fleet.freezes.fleet is not None else "nothing is"
            raise not_found(f"{key} is not frozen itself ({covering})")
        await self._store.drop_freeze(key)
        self._fleet.freezes.drop(key)
        _log.warning("unfrozen", what=key, author=author)
        told = self._wake(hosts)
        await self._audit("unfreeze", author, key, "")
        return op.UnfreezeResponse(hosts=told)

    async def drain(self, request: op.DrainRequest, context: Context) -> op.DrainResponse:
        """Everything of a VM back. It stays frozen until 'unfreeze', or the next decision would undo the drain."""
        author = author_of(context)
        host, vm = self._fleet.find_vm(request.vm)
        session = host.session
        if session is None:
            text = f"host {host.node_id} is not connected, nobody can drain {request.vm}; its lease runs out by itself"
            raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, text)
        key = vm_key(vm.identity.vm_id)
        self._fleet.freezes.put(key, "drained", author, drain=True)
        command_id, result = self._hub.commands.start(host.node_id)
        command = wire.Command(command_id=command_id, drain=wire.DrainCommand(vm_id=vm.identity.vm_id))
        if not session.send_command(command):
            text = f"too many commands wait for host {host.node_id} already; try again later"
            raise StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, text)
        _log.warning("drain", vm=vm.identity.name or vm.identity.vm_id, node_id=host.node_id, author=author)
        session.wake()
        await self._save("drain", author, key, "")
        if request.wait:
            await self._wait_drained(host, vm.identity.vm_id, result, context)
        # The record may be another one by now: its agent may have come back meanwhile.
        away = self._away(host, vm.identity.vm_id)
        return op.DrainResponse(command_id=command_id, done=away == 0, evicted_bytes=away)

    async def _wait_drained(
        self, host: HostRecord, vm_id: str, result: asyncio.Future[wire.CommandResult], context: Context
    ) -> None:
        """Until a report says that nothing is away, the agent says that it cannot, or the deadline is near."""
        limit = context.time_remaining()
        seconds = MAX_WAIT_SECONDS if limit is None else min(limit - DEADLINE_MARGIN_SECONDS, MAX_WAIT_SECONDS)
        deadline, refresh_at = time.monotonic() + seconds, time.monotonic() + REFRESH_SECONDS
        while time.monotonic() < deadline and self._away(host, vm_id) > 0:
            if result.done() and not result.cancelled() and not result.result().done:
                detail = result.result().detail or "it gave no reason"
                raise StatusError(grpc.StatusCode.FAILED_PRECONDITION, f"the agent could not drain {vm_id}: {detail}")
            if time.monotonic() >= refresh_at and host.session is not None:
                refresh_at = time.monotonic() + REFRESH_SECONDS
                host.session.refresh("an operator waits for a drain")
            await asyncio.sleep(POLL_SECONDS)

    @staticmethod
    def _away(host: HostRecord, vm_id: str) -> int:
        vm: VmRecord | None = host.vms.get(vm_id)
        return vm.state.evicted_bytes if vm is not None and vm.state is not None else 0

    def _target(self, node_id: str, vm: str, *, must_exist: bool) -> tuple[str, list[HostRecord]]:
        """What is meant, and the hosts that it concerns."""
        if node_id and vm:
            raise bad_request("give a host or a VM, not both", [("vm", "given together with node_id")])
        if vm:
            if not must_exist and self._fleet.freezes.get(vm_key(vm)) is not None:
                return vm_key(vm), list(self._fleet.hosts.values())  # it may be gone by now
            host, record = self._fleet.find_vm(vm)
            return vm_key(record.identity.vm_id), [host]
        if node_id:
            if not must_exist and self._fleet.freezes.get(host_key(node_id)) is not None:
                return host_key(node_id), [self._fleet.hosts[node_id]] if node_id in self._fleet.hosts else []
            return host_key(node_id), [self._fleet.find_host(node_id)]
        return FLEET, list(self._fleet.hosts.values())

    def _wake(self, hosts: list[HostRecord]) -> int:
        told = 0
        self._fleet.revision += 1
        for host in hosts:
            self._fleet.touch(host)
            if host.session is not None:
                host.session.wake()
                told += 1
        return told

    async def _save(self, action: str, author: str, key: str, why: str) -> None:
        try:
            await self._keeper.save_freezes()
        except StoreError as error:
            _log.error("in force, but not in Redis yet: a restart now would lose it", what=key, why=str(error))
            return
        await self._audit(action, author, key, why)

    async def _audit(self, action: str, author: str, key: str, why: str) -> None:
        try:
            await self._store.audit(action, author, {"what": key, "why": why, "at_unix_ns": str(time.time_ns())})
        except StoreError as error:
            _log.error("not in the audit log", action=action, author=author, what=key, why=str(error))
