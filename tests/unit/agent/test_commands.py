# SPDX-License-Identifier: Apache-2.0
"""Commands over the session: done once, answered when done; and the fail-safe's choice."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from frostline.agent.commands import MAX_REMEMBERED, Commands
from frostline.agent.failsafe import Failsafe, next_to_drain
from frostline.agent.host import Host
from frostline.agent.procfs import HostMemory
from frostline.agent.vm import Phase
from frostline.native import CommandKind, State
from frostline.v1.session_pb2 import Command, CommandResult, DetachCommand, DrainCommand, PrefetchCommand
from tests.unit.agent.doubles import GIB, StandInVm, a_status, a_vm, as_managed


class OneHost:
    def __init__(self, *vms: StandInVm) -> None:
        self.vms = {vm.vm_id: vm for vm in vms}

    def by_id(self) -> dict[str, StandInVm]:
        return self.vms


def commands_for(*vms: StandInVm) -> Commands:
    return Commands(cast(Host, OneHost(*vms)))


async def do(commands: Commands, command: Any) -> list[CommandResult]:
    answers: list[CommandResult] = []
    async with asyncio.timeout(10):
        await commands.do(command, answers.append)
    return answers


async def test_a_drain_is_answered_once_when_nothing_is_away() -> None:
    vm = a_vm(1, status=a_status(evicted_pages=5))
    commands = commands_for(vm)
    task = asyncio.create_task(do(commands, Command(command_id="a", drain=DrainCommand(vm_id="id-1"))))
    await asyncio.sleep(0.4)
    assert not task.done() and [command.kind for command in vm.told] == [CommandKind.DRAIN]
    vm.status = a_status(evicted_pages=0)
    answers = await task
    assert len(answers) == 1 and answers[0].done


async def test_a_repeated_id_gets_the_same_answer_and_does_nothing() -> None:
    vm = a_vm(1, status=a_status())
    commands = commands_for(vm)
    command = Command(command_id="a", prefetch=PrefetchCommand(vm_id="id-1", first_page=3, page_count=4))
    first, second = await do(commands, command), await do(commands, command)
    assert first == second and first[0].done and len(vm.told) == 1
    assert (vm.told[0].first_page, vm.told[0].page_count) == (3, 4)


async def test_what_is_remembered_is_bounded() -> None:
    vm = a_vm(1, status=a_status())
    commands = commands_for(vm)
    for number in range(MAX_REMEMBERED + 1):
        await do(commands, Command(command_id=str(number), prefetch=PrefetchCommand(vm_id="id-1")))
    await do(commands, Command(command_id="0", prefetch=PrefetchCommand(vm_id="id-1")))
    assert len(vm.told) == MAX_REMEMBERED + 2


async def test_what_cannot_be_done_is_said() -> None:
    vm = a_vm(1, status=a_status())
    vm.problem = "no pager serves this VM now"
    commands = commands_for(vm)
    unknown = await do(commands, Command(command_id="a", drain=DrainCommand(vm_id="ghost")))
    assert not unknown[0].done and "ghost" in unknown[0].detail
    broken = await do(commands, Command(command_id="b", drain=DrainCommand(vm_id="id-1")))
    assert not broken[0].done and broken[0].detail == vm.problem
    assert not (await do(commands, Command(command_id="c")))[0].done
    assert not (await do(commands, Command(drain=DrainCommand(vm_id="id-1"))))[0].done


async def test_a_detach_holds_until_the_next_set() -> None:
    vm = a_vm(1, status=a_status(), phase=Phase.IDLE)
    answers = await do(commands_for(vm), Command(command_id="a", detach=DetachCommand(vm_id="id-1")))
    assert answers[0].done and vm.wanted_calls == [False]
    assert vm.grant is not None and not vm.grant.attach


def test_the_fail_safe_takes_the_smallest_first_one_at_a_time_and_only_with_ram() -> None:
    small, large = a_vm(1, status=a_status(evicted_pages=10)), a_vm(2, status=a_status(evicted_pages=10_000))
    roomy, tight = HostMemory(8 * GIB, 4 * GIB), HostMemory(8 * GIB, GIB // 8)
    vms = [as_managed(large), as_managed(small)]
    assert next_to_drain(vms, roomy)[0] is vms[1]
    chosen, why_not = next_to_drain(vms, tight)
    assert chosen is None and "RAM" in why_not
    small.status = a_status(evicted_pages=10, state=State.DRAIN)
    assert next_to_drain(vms, roomy) == (None, "")
    assert next_to_drain([as_managed(a_vm(3, status=a_status()))], roomy) == (None, "")


async def test_the_fail_safe_waits_its_time() -> None:
    vm = a_vm(1, status=a_status(evicted_pages=10))
    failsafe = Failsafe(60.0)
    await failsafe.watch(59.0, [as_managed(vm)], HostMemory(8 * GIB, 4 * GIB))
    assert not vm.told
    await failsafe.watch(61.0, [as_managed(vm)], HostMemory(8 * GIB, 4 * GIB))
    assert [command.kind for command in vm.told] == [CommandKind.DRAIN]
