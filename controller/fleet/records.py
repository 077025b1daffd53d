# SPDX-License-Identifier: Apache-2.0
"""One host and one VM as the controller knows them. Times are time.monotonic() unless the name says otherwise."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Protocol

from frostline.controller.policy.snapshot import Bin, Decision, VmSnapshot
from frostline.v1 import common_pb2 as pb
from frostline.v1 import operator_pb2 as op
from frostline.v1 import session_pb2 as wire


class Session(Protocol):
    """What the rest of the controller may ask of a host's open stream."""

    def wake(self) -> None:
        """Decide again soon: something that decisions depend on has changed."""

    def send_command(self, command: wire.Command) -> bool:
        """Queue a command; False when too many wait already."""

    def refresh(self, why: str) -> None:
        """Ask for a full report now instead of waiting for the next one."""

    def close(self, code: str, text: str) -> None:
        """End the stream with a gRPC status code name and a reason."""


@dataclass(slots=True)
class VmRecord:
    """A VM on one host."""

    identity: pb.VmIdentity
    state: pb.VmState | None = None  # last good one
    state_at: float | None = None
    problem: str = ""  # why the newest report of it was not used
    decision: Decision | None = None
    decided_at_unix_ns: int = 0
    pushed_version: int = 0  # budget set that last carried it
    ack: op.VmAck | None = None
    revision: int = 0

    def snapshot(self, now: float) -> VmSnapshot:
        """This VM as the policy sees it at `now`."""
        state, identity = self.state, self.identity
        if state is None or self.state_at is None:
            return VmSnapshot(
                vm_id=identity.vm_id,
                name=identity.name,
                uuid=identity.uuid,
                vm_class=identity.vm_class,
                memory_bytes=identity.memory_bytes,
                problem=self.problem,
            )
        histogram = state.histogram
        return VmSnapshot(
            vm_id=identity.vm_id,
            name=identity.name,
            uuid=identity.uuid,
            vm_class=identity.vm_class,
            memory_bytes=state.memory_bytes or identity.memory_bytes,
            resident_bytes=state.resident_bytes,
            evicted_bytes=state.evicted_bytes,
            bins=tuple(
                Bin(age, resident, evicted)
                for age, resident, evicted in zip(
                    histogram.min_age_seconds, histogram.resident_bytes, histogram.evicted_bytes, strict=True
                )
            ),
            scans=state.counters.scans,
            refusal=refusal_words(state),
            corrupt=state.pager_state == pb.PAGER_STATE_CORRUPT,
            report_age_seconds=max(now - self.state_at, 0.0),
            problem=self.problem,
        )


@dataclass(slots=True)
class HostRecord:
    """A host: what its agent said, and what it was told."""

    node_id: str
    agent_version: str = ""
    boot_id: str = ""
    host_memory_bytes: int = 0
    host_available_bytes: int = 0
    vms: dict[str, VmRecord] = field(default_factory=dict)
    session: Session | None = None
    last_seen: float = field(default_factory=time.monotonic)
    report_traceparent: str = ""  # of the newest report that no decision was made from yet
    version_desired: int = 0
    version_applied: int = 0
    epoch: int = 0  # of the last set sent
    refused_report: str = ""  # what was wrong with the newest report, until a good one
    refused_hello: str = ""  # why agents with its node id are turned away
    refused_hello_until: float = 0.0  # how long that is worth saying; good reports of the one that stayed do not end it
    revision: int = 0

    @property
    def note(self) -> str:
        """What is odd about it, for operators; "" when nothing is."""
        refused_hello = self.refused_hello if time.monotonic() < self.refused_hello_until else ""
        return "; ".join(words for words in (refused_hello, self.refused_report) if words)

    def vm_label(self, vm_id: str) -> str:
        record = self.vms.get(vm_id)
        return (record.identity.name or vm_id) if record else vm_id


_REFUSALS = {
    pb.REFUSAL_GONE: "its VMM is gone",
    pb.REFUSAL_NOT_SHARED_MEMFD: "its memory is not a shared memfd",
    pb.REFUSAL_PASSTHROUGH: "a device is passed through to it",
    pb.REFUSAL_LOCKED: "its memory is locked",
    pb.REFUSAL_OTHER_MAPPER: "another process maps its memory",
    pb.REFUSAL_FOREIGN_UFFD: "somebody else's userfaultfd owns its memory",
    pb.REFUSAL_ALREADY_SERVED: "another pager serves it",
    pb.REFUSAL_TRACED: "another process traces its VMM",
    pb.REFUSAL_SECCOMP: "the VMM's seccomp filter forbids what attaching needs",
    pb.REFUSAL_PERMISSION: "the agent lacks a permission",
    pb.REFUSAL_KERNEL: "the host's kernel lacks a feature",
    pb.REFUSAL_VAULT_INVALID: "its vault is not usable",
    pb.REFUSAL_HUGETLB: "its memory is hugetlbfs",
    pb.REFUSAL_STUCK: "its VMM could not be stopped in time",
    pb.REFUSAL_LIMIT: "a limit of the host was reached",
    pb.REFUSAL_INTERNAL: "attaching failed for an unexpected reason",
}


def refusal_words(state: pb.VmState) -> str:
    """Why a VM is not served, for people; empty when nothing is in the way."""
    if state.refusal == pb.REFUSAL_UNSPECIFIED:
        return ""
    words = _REFUSALS.get(state.refusal, f"refusal {state.refusal}, unknown to this controller")
    return f"{words} ({state.refusal_detail})" if state.refusal_detail else words
