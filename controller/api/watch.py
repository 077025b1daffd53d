# SPDX-License-Identifier: Apache-2.0
"""Following the picture: at most one message per interval, with what changed since the last one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc

from frostline.controller.api.status import StatusError, bad_request, retry_later
from frostline.controller.api.view import host_message, vm_message
from frostline.controller.fleet.fleet import Fleet
from frostline.v1 import operator_pb2 as op

MAX_WATCHERS = 64
MIN_SECONDS, DEFAULT_SECONDS, MAX_SECONDS = 0.2, 1.0, 60.0

_VmKey = tuple[str, str]


class Watchers:
    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self.open = 0
        self.closing = asyncio.Event()

    async def watch(self, request: op.WatchRequest) -> AsyncIterator[op.WatchResponse]:
        """The current picture, then changes. Ends with UNAVAILABLE when the controller stops."""
        interval = request.interval_seconds or DEFAULT_SECONDS
        if not MIN_SECONDS <= interval <= MAX_SECONDS:
            why = f"{interval:g} is outside of {MIN_SECONDS:g} to {MAX_SECONDS:g}"
            raise bad_request("interval out of range", [("interval_seconds", why)])
        if request.vm:
            self._fleet.find_vm(request.vm)
        if self.open >= MAX_WATCHERS:
            text = f"{MAX_WATCHERS} watches are open already; end one of them"
            raise retry_later(grpc.StatusCode.RESOURCE_EXHAUSTED, text, 5.0)
        self.open += 1
        try:
            seen: dict[_VmKey, int] = {}
            revision = -1
            while True:
                if self._fleet.revision != revision:
                    revision = self._fleet.revision
                    yield self._changes(request.vm, seen)
                try:
                    async with asyncio.timeout(interval):
                        await self.closing.wait()
                except TimeoutError:
                    continue
                raise StatusError(grpc.StatusCode.UNAVAILABLE, "the controller is stopping")
        finally:
            self.open -= 1

    def _changes(self, only: str, seen: dict[_VmKey, int]) -> op.WatchResponse:
        """What is new since `seen`, which is brought up to date."""
        response = op.WatchResponse()
        now: set[_VmKey] = set()
        for host, vm in self._fleet.vms():
            identity = vm.identity
            if only and only not in (identity.vm_id, identity.uuid, identity.name):
                continue
            key = (host.node_id, identity.vm_id)
            now.add(key)
            if seen.get(key) != vm.revision:
                seen[key] = vm.revision
                response.vms.append(vm_message(host, vm, histogram=bool(only)))
        for key in seen.keys() - now:
            del seen[key]
            if not any(vm_id == key[1] for _, vm_id in now):
                response.gone_vm_ids.append(key[1])
        shown = {node_id for node_id, _ in now} if only else self._fleet.hosts.keys()
        response.hosts.extend(host_message(self._fleet, self._fleet.hosts[node_id]) for node_id in sorted(shown))
        return response
