# SPDX-License-Identifier: Apache-2.0
"""When the kernel's lists are looked at, and for whom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from frostline.agent.estimates import Estimates
from frostline.agent.mglru import ColdEstimate, Mglru
from frostline.agent.vm import Phase
from tests.unit.agent.doubles import GIB, StandInVm, a_status, a_vm, as_managed


class FakeMglru:
    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.answer: ColdEstimate | str = ColdEstimate((9 * GIB, 1, 0, 0), 1.0, 0)

    def estimates(self, pids: Sequence[int]) -> dict[int, ColdEstimate | str]:
        self.asked.append(list(pids))
        return dict.fromkeys(pids, self.answer)


async def refresh(keeper: Estimates, *vms: StandInVm) -> None:
    await keeper.refresh([as_managed(vm) for vm in vms])


async def test_only_those_that_nobody_is_attached_to_and_only_now_and_then() -> None:
    now = [1000.0]
    mglru = FakeMglru()
    keeper = Estimates(cast(Mglru, mglru), lambda: now[0])
    served, refused, starting = a_vm(1, status=a_status()), a_vm(2, phase=Phase.REFUSED), a_vm(3, phase=Phase.STARTING)
    await refresh(keeper, served, starting)
    assert mglru.asked == []
    await refresh(keeper, served, refused, starting)
    assert mglru.asked == [[102]]
    assert refused.cold_estimate is not None and refused.cold_estimate.cold_bytes == (GIB, 1, 0, 0)
    assert served.cold_estimate is None and starting.cold_estimate is None
    now[0] += 59.0
    await refresh(keeper, served, refused)
    assert len(mglru.asked) == 1
    now[0] += 2.0
    mglru.answer = "no swap"
    await refresh(keeper, served, refused)
    assert len(mglru.asked) == 2 and refused.cold_estimate is None and refused.no_estimate_why == "no swap"

    # A new one does not wait a minute, and one that is served from now on keeps no estimate.
    new = a_vm(4, phase=Phase.IDLE)
    await refresh(keeper, refused, new)
    assert len(mglru.asked) == 2
    now[0] += 6.0
    mglru.answer = ColdEstimate((1, 1, 0, 0), 1.0, 0)
    await refresh(keeper, refused, new)
    assert mglru.asked[2] == [102, 104] and new.cold_estimate is not None
    new.status = a_status()
    await refresh(keeper, refused, new)
    assert new.cold_estimate is None and new.no_estimate_why == ""
