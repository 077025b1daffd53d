# SPDX-License-Identifier: Apache-2.0
"""Proof from QEMU's monitor that an emulated CPU has stopped for good.

TCG has been seen to leave a CPU with SVM's global interrupt flag clear, far from any VMRUN: the kernel's idle loop
halts with interrupts enabled, and is never woken again. No kernel clears that flag and halts: a halted CPU with
interrupts enabled takes the one that is due.
"""

import re
import time
from dataclasses import dataclass

from tests.system.guest.qmp import QmpClient

_LOOKS = 10
_PAUSE_SECONDS = 0.5
_INTERRUPTS_ENABLED = 0x200  # RFLAGS.IF
_CLASS_SHIFT = 4  # a vector's priority class, and the processor's in PPR


@dataclass(frozen=True)
class Halt:
    """A CPU that is halted with interrupts enabled: where, and which vectors it would have to take."""

    rip: int
    rsp: int
    due: frozenset[int]


def halt(registers: str, apic: str) -> Halt | None:
    """From what the monitor says to ``info registers`` and ``info lapic``; None: it runs, or it holds interrupts off.

    ValueError: the monitor says something else than is known.
    """
    values = {}
    for name, base in (("RIP", 16), ("RSP", 16), ("RFL", 16), ("HLT", 10)):
        found = re.search(rf"\b{name}=([0-9a-f]+)", registers)
        if found is None:
            raise ValueError(f"no {name} in: {registers[:200]}")
        values[name] = int(found[1], base)
    vectors = {}
    for name in ("ISR", "IRR"):
        found = re.search(rf"^{name}\s+((?:\d+ ?)+|\(none\))", apic, re.MULTILINE)
        if found is None:
            raise ValueError(f"no {name} in: {apic[:200]}")
        vectors[name] = frozenset(map(int, found[1].split())) if found[1] != "(none)" else frozenset()
    found = re.search(r"\bPPR 0x([0-9a-f]+)", apic)
    if found is None:
        raise ValueError(f"no PPR in: {apic[-200:]}")
    if not values["HLT"] or not values["RFL"] & _INTERRUPTS_ENABLED or vectors["ISR"] or "APIC disabled" in apic:
        return None
    priority = int(found[1], 16) >> _CLASS_SHIFT
    due = frozenset(vector for vector in vectors["IRR"] if vector >> _CLASS_SHIFT > priority)
    return Halt(values["RIP"], values["RSP"], due)


def _look(monitor: QmpClient, cpu: int) -> Halt | None:
    registers, apic = (
        monitor.execute("human-monitor-command", command_line=command, cpu_index=cpu)
        for command in ("info registers", "info lapic")
    )
    return halt(registers, apic)


def stopped_cpu(monitor: QmpClient, cpus: int) -> str | None:
    """A sentence about the first CPU that took none of the interrupts due for seconds; None: there is no such CPU.

    GuestError: the monitor does not answer.
    """
    seen: dict[int, Halt] = {}
    for look in range(_LOOKS):
        for cpu in range(cpus):
            found = _look(monitor, cpu) if look == 0 or cpu in seen else None
            before = seen.pop(cpu, found)
            if found is None or before is None or (found.rip, found.rsp) != (before.rip, before.rsp):
                continue
            due = found.due & before.due
            if due:
                seen[cpu] = Halt(found.rip, found.rsp, due)
        if not seen:
            return None
        time.sleep(_PAUSE_SECONDS)
    cpu, left = next(iter(seen.items()))
    return (
        f"CPU {cpu} of the emulated machine is halted at {left.rip:#x} with interrupts enabled, and has not taken "
        f"interrupt {max(left.due)} for {_LOOKS * _PAUSE_SECONDS:g} s"
    )
