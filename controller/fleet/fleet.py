# SPDX-License-Identifier: Apache-2.0
"""The whole picture: hosts, VMs, freezes, and the policy in force."""

from __future__ import annotations

import time
from collections.abc import Iterator

from frostline.controller.fleet.freezes import Freezes, host_key, vm_key
from frostline.controller.fleet.records import HostRecord, VmRecord
from frostline.controller.policy.document import Policy, built_in
from frostline.controller.policy.snapshot import Flags
from frostline.v1 import operator_pb2 as op

MAX_HOSTS = 20_000
# A host that left is shown for this long; afterwards nothing of it is left here.
FORGET_SECONDS = 3600.0


class NotFoundError(Exception):
    """No such host or VM."""


class AmbiguousError(Exception):
    """A name that several VMs have."""


class Fleet:
    """Owned by the event loop: no method blocks, and none may be called from another thread."""

    def __init__(self, heartbeat_seconds: float, report_seconds: float) -> None:
        self.heartbeat_seconds = heartbeat_seconds
        self.report_seconds = report_seconds
        self.hosts: dict[str, HostRecord] = {}
        self.freezes = Freezes()
        self.policy: Policy = built_in()
        self.revision = 0

    def touch(self, record: HostRecord | VmRecord) -> None:
        """Mark a record as changed, for those who watch."""
        self.revision += 1
        record.revision = self.revision

    def wake_all(self) -> int:
        """Let every open session decide again; how many there are."""
        sessions = [host.session for host in self.hosts.values() if host.session is not None]
        for session in sessions:
            session.wake()
        return len(sessions)

    def vms(self) -> Iterator[tuple[HostRecord, VmRecord]]:
        for host in self.hosts.values():
            for vm in host.vms.values():
                yield host, vm

    def flags(self, host: HostRecord, vm: VmRecord) -> Flags:
        """Freezes and session facts for one decision."""
        vm_freeze = self.freezes.get(vm_key(vm.identity.vm_id))
        return Flags(
            fleet_frozen=self.freezes.fleet is not None,
            host_frozen=self.freezes.get(host_key(host.node_id)) is not None,
            vm_frozen=vm_freeze is not None,
            draining=vm_freeze is not None and vm_freeze.drain,
            last_budget_bytes=vm.decision.budget_bytes if vm.decision is not None else 0,
            report_seconds=self.report_seconds,
        )

    def host_state(self, host: HostRecord, now: float | None = None) -> op.HostState.ValueType:
        if host.session is None:
            return op.HOST_STATE_GONE
        silent_seconds = (time.monotonic() if now is None else now) - host.last_seen
        return op.HOST_STATE_SUSPECT if silent_seconds > 4 * self.heartbeat_seconds else op.HOST_STATE_CONNECTED

    def find_host(self, node_id: str) -> HostRecord:
        host = self.hosts.get(node_id)
        if host is None:
            raise NotFoundError(f"no host {node_id!r}; 'frostline hosts' lists those known")
        return host

    def find_vm(self, wanted: str) -> tuple[HostRecord, VmRecord]:
        """By id, UUID or name. A VM that moved is taken where its host is connected."""
        for field in ("vm_id", "uuid", "name"):
            found = [(host, vm) for host, vm in self.vms() if wanted and getattr(vm.identity, field) == wanted]
            if len(found) > 1:
                found = [pair for pair in found if pair[0].session is not None] or found
            if len(found) == 1:
                return found[0]
            if found:
                ids = ", ".join(f"{vm.identity.vm_id} on {host.node_id}" for host, vm in found[:8])
                what = field.removeprefix("vm_")
                raise AmbiguousError(f"{len(found)} VMs have the {what} {wanted!r}: {ids}; name one by its id")
        raise NotFoundError(f"no VM {wanted!r}; 'frostline vms' lists those known")

    def forget_gone(self, now: float | None = None) -> list[str]:
        """Drop hosts that left long ago; their ids."""
        now = time.monotonic() if now is None else now
        gone = [
            node_id
            for node_id, host in self.hosts.items()
            if host.session is None and now - host.last_seen > FORGET_SECONDS
        ]
        for node_id in gone:
            del self.hosts[node_id]
        if gone:
            self.revision += 1
        return gone
