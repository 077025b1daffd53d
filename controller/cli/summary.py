# SPDX-License-Identifier: Apache-2.0
"""The line under a table: what it comes to, and what an operator should know before reading the rows."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from frostline.controller.cli.document import saved_bytes
from frostline.controller.cli.screen import Screen
from frostline.controller.cli.words import clean
from frostline.v1 import operator_pb2
from frostline.wire.units import format_size


def fleet_line(answer: operator_pb2.ListHostsResponse, screen: Screen) -> Text:
    hosts = answer.hosts
    if not hosts:
        return Text("no host has reported yet: start frostline-agent on one, with this controller's address")
    text = Text(
        _joined(
            screen,
            _count(len(hosts), "host"),
            _count(sum(host.vm_count for host in hosts), "VM"),
            f"{format_size(sum(host.evicted_bytes for host in hosts))} away",
            f"{format_size(sum(host.saved_bytes for host in hosts))} of RAM saved",
            f"policy version {answer.policy_version}" if answer.policy_version else "no policy put yet",
        )
    )
    for host in hosts:
        if host.note:
            text.append(f"\n{clean(host.node_id)}: {clean(host.note)}", style="yellow")
    if answer.fleet_frozen:
        text.append("\nthe fleet is frozen: nothing new is evicted", style="yellow")
    if not answer.store_available:
        problem = f" ({clean(answer.store_problem)})" if answer.store_problem else ""
        text.append(f"\nthe state store is away{problem}: policy is the last known, changes are refused", "bold red")
    return text


def vms_line(vms: Sequence[operator_pb2.Vm], screen: Screen) -> Text:
    if not vms:
        return Text("no VM is known: `frostline hosts` shows which agents report")
    evicted = sum(vm.state.evicted_bytes for vm in vms)
    memory = sum(vm.state.memory_bytes or vm.identity.memory_bytes for vm in vms)
    share = f" ({evicted * 100 // memory} %)" if memory else ""
    return Text(
        _joined(
            screen,
            _count(len(vms), "VM"),
            f"{format_size(evicted)} of {format_size(memory)} away{share}",
            f"{format_size(sum(saved_bytes(vm.state) for vm in vms))} of RAM saved",
        )
    )


def _joined(screen: Screen, *parts: str) -> str:
    return f" {screen.glyphs.bullet} ".join(parts)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
