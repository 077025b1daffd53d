# SPDX-License-Identifier: Apache-2.0
"""Values and stand-ins that several tests need: a VM with a status, without processes behind it."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, cast

from frostline.agent.budgets import Grant, VmFacts
from frostline.agent.discovery import Vmm
from frostline.agent.mglru import ColdEstimate
from frostline.agent.procfs import ProcessId
from frostline.agent.vm import Held, Phase, Vm
from frostline.native import AGE_BINS, Command, Freeze, Record, RecordKind, Refusal, State, Status, Tracker, Why
from frostline.native.view import STATUS_FIELDS

GIB = 1 << 30


def a_status(**changes: Any) -> Status:
    """An active pager's status with little in it."""
    numbers: dict[str, Any] = dict.fromkeys(STATUS_FIELDS, 0)
    numbers |= {
        "state": State.ACTIVE,
        "why": Why.NOTHING_COLD,
        "refusal": Refusal.NONE,
        "tracker": Tracker.ZAP,
        "freeze": Freeze.WP,
        "pager_pid": 77,
        "pager_alive": True,
        "now_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        "memory_bytes": GIB,
        "resident_bytes": GIB // 2,
        "scan_interval_ns": 5 * 10**9,
        "brake_permille": 1000,
        "resident_age_bytes": (0,) * AGE_BINS,
        "evicted_age_bytes": (0,) * AGE_BINS,
        "promotions": (0,) * AGE_BINS,
        "fault_latency": (0,) * 64,
    }
    return replace(Status(**numbers), **changes)


def a_record(kind: RecordKind, sequence: int = 1, **changes: Any) -> Record:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    record = Record(sequence, kind, 2, now - 2_000_000, now - 1_000_000, 10, 4096, 0, 1)
    return replace(record, **changes)


@dataclass(eq=False)
class StandInVm:
    """What reports, traces and commands look at in a VM."""

    vm_id: str
    vmm: Vmm
    phase: Phase = Phase.SERVED
    status: Status | None = None
    grant: Grant | None = None
    refusal: Refusal = Refusal.NONE
    refusal_detail: str = ""
    vm_class: str = ""
    pager_pid: int = 77
    memory_bytes: int = GIB
    grant_version: int = 0
    wanted: bool = True
    held: Held = Held.NOT
    pager_restarts: int = 0
    last_takeover_seconds: float = 0.0
    cold_estimate: ColdEstimate | None = None
    no_estimate_why: str = ""

    def __post_init__(self) -> None:
        self.told: list[Command] = []
        self.wanted_calls: list[bool] = []
        self.problem = ""

    @property
    def evicted_bytes(self) -> int:
        return self.status.evicted_bytes if self.status else 0

    @property
    def facts(self) -> VmFacts:
        return VmFacts(self.vm_id, self.vmm.uuid, self.vmm.name, self.memory_bytes)

    def read_status(self) -> None:
        return

    def want(self, attach: bool) -> None:
        self.wanted_calls.append(attach)

    def set_grant(self, grant: Grant, version: int, _lease_until_ns: int) -> None:
        self.grant, self.grant_version = grant, version

    async def tell(self, command: Command) -> str:
        self.told.append(command)
        return self.problem


def a_vm(number: int = 1, **fields: Any) -> StandInVm:
    vmm = Vmm(ProcessId(100 + number, 1000 + number), f"vm-{number}", "", "/usr/bin/qemu-system-x86_64")
    return StandInVm(f"id-{number}", vmm, **fields)


def as_managed(vm: StandInVm) -> Vm:
    return cast(Vm, vm)
