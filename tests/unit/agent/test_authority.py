# SPDX-License-Identifier: Apache-2.0
"""What the host's own limits do to budgets that are in force already, whatever the session is doing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from frostline.agent.authority import Authority
from frostline.agent.host import Host
from frostline.agent.limits import parse_limits
from frostline.agent.state import StateFile
from frostline.agent.traces import Traces
from frostline.v1.common_pb2 import MODE_ENFORCE, REASON_EPOCH, REASON_INVALID
from frostline.v1.session_pb2 import Budget, BudgetSet
from frostline.wire.telemetry import configure
from tests.unit.agent.doubles import GIB, StandInVm, a_vm

OPEN = parse_limits("version: 1\nallow_evict: true\n", "limits.yaml")
SHUT = parse_limits("version: 1\nallow_evict: false\n", "limits.yaml")


class BudgetedVm(StandInVm):
    """Remembers what it may have away, and until when."""

    discovered_at = 0.0
    lease_until_ns = 0

    def want(self, attach: bool, forbidden: bool = False) -> None:
        self.wanted_calls.append(attach and not forbidden)

    def set_grant(self, grant: Any, version: int, lease_until_ns: int) -> None:
        super().set_grant(grant, version, lease_until_ns)
        self.lease_until_ns = lease_until_ns

    async def apply(self) -> str:
        return ""

    @property
    def bytes(self) -> int:
        return self.grant.bytes if self.grant is not None and self.lease_until_ns else 0


@pytest.fixture
def vm() -> BudgetedVm:
    made = a_vm(1)
    return BudgetedVm(made.vm_id, made.vmm)


@pytest.fixture
def authority(vm: BudgetedVm, tmp_path: Path) -> Iterator[Authority]:
    telemetry = configure("test", install_global=False)
    state = StateFile(tmp_path / "state.json")
    yield Authority(cast(Host, [vm]), OPEN, state, Traces(telemetry), attach_grace_seconds=0.0)
    telemetry.shutdown()


def a_set(version: int = 1, epoch: int = 5) -> BudgetSet:
    budget = Budget(vm_id="id-1", mode=MODE_ENFORCE, bytes=GIB // 2, min_age_seconds=60)
    return BudgetSet(epoch=epoch, version=version, lease_seconds=60, budgets=[budget])


async def test_tighter_limits_hold_at_once_also_on_a_new_stream_that_has_said_nothing_yet(
    authority: Authority, vm: BudgetedVm
) -> None:
    assert (await authority.take(a_set())).applied and vm.bytes == GIB // 2
    authority.forget_stream()
    await authority.reapply(SHUT)
    assert vm.bytes == 0 and vm.grant is not None and "allow_evict" in vm.grant.sentence


async def test_a_budget_in_force_outlives_a_reload_after_a_new_controllers_welcome(
    authority: Authority, vm: BudgetedVm
) -> None:
    await authority.take(a_set())
    lease = vm.lease_until_ns
    assert await authority.welcome(9) == ""
    authority.forget_stream()
    await authority.reapply(OPEN)
    assert (vm.bytes, vm.lease_until_ns) == (GIB // 2, lease), "neither lost nor made longer"
    late = await authority.take(a_set(version=2))
    assert (late.applied, late.reason) == (False, REASON_EPOCH), "the fence is as high as the welcome"


async def test_versions_are_compared_within_a_stream(authority: Authority) -> None:
    assert (await authority.take(a_set(version=7))).applied
    old = await authority.take(a_set(version=6))
    assert (old.applied, old.reason) == (False, REASON_INVALID)
    authority.forget_stream()
    assert (await authority.take(a_set(version=1))).applied
