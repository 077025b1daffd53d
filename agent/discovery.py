# SPDX-License-Identifier: Apache-2.0
"""Finds the VMMs of this host: QEMU processes through /proc, named by their command lines.

A sweep over all of /proc costs tens of microseconds a process, so a process that has been looked at for
SETTLED_SECONDS without turning out to be a VMM (a shell may still exec one) is only looked at again in a full
sweep, every FULL_SWEEP_SECONDS.
"""

from __future__ import annotations

import itertools
import os
import re
import time
import uuid as uuids
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from frostline.agent.procfs import MAX_CMDLINE_BYTES, ProcessId, list_pids, read_stat

SETTLED_SECONDS: Final = 10.0
FULL_SWEEP_SECONDS: Final = 60.0
MAX_NAME_CHARACTERS: Final = 128

# What QEMU's system emulators are called: Debian and upstream; RHEL; Proxmox and old Debian.
_VMM_NAME: Final = re.compile(r"^(qemu-system-[\w-]+|qemu-kvm|kvm)$")
# The kernel cuts comm at 15 characters, so "qemu-system-x86_64" arrives as "qemu-system-x86".
_VMM_COMM: Final = re.compile(r"^(qemu-system-\w*|qemu-kvm|kvm)$")
_SIZE: Final = re.compile(r"(\d{1,12})([KMGT]?)", re.IGNORECASE)
_SHIFTS: Final = {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}
_UNPRINTABLE: Final = re.compile(r"[^\w.,:@+ -]")


@dataclass(frozen=True, slots=True)
class Vmm:
    """A VMM that was found: who it is, and what its command line calls the VM."""

    process: ProcessId
    name: str
    uuid: str  # canonical lower case; empty when the command line has none
    executable: str
    memory_bytes: int = 0  # as the command line says; 0 when it does not


@dataclass(frozen=True, slots=True)
class CommandLine:
    """What a QEMU command line says about its VM."""

    name: str
    uuid: str
    memory_bytes: int = 0


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Name and UUID; empty where there is none. The last of an option that is given twice counts, as in QEMU."""
    name = ""
    uuid = ""
    smbios_uuid = ""
    memory_bytes = 0
    for option, value in itertools.pairwise(argv):
        if option in ("-name", "--name"):
            name = _name(value)
        elif option in ("-uuid", "--uuid"):
            uuid = _uuid(value)
        elif option == "-m":
            memory_bytes = _memory(value)
        elif option in ("-smbios", "--smbios"):
            properties = _properties(value)
            if properties.get("type") == "1":
                smbios_uuid = _uuid(properties.get("uuid", ""))
    return CommandLine(name=name, uuid=uuid or smbios_uuid, memory_bytes=memory_bytes)


def is_vmm(executable: str, comm: str, argv: Sequence[str]) -> bool:
    """True when any of the three names a QEMU system emulator and it is really called with options."""
    if len(argv) < 2:
        return False
    name = Path(executable.removesuffix(" (deleted)")).name
    if name:
        return bool(_VMM_NAME.match(name))
    return bool(_VMM_COMM.match(comm) and _VMM_NAME.match(Path(argv[0]).name))


def vm_ids(vmms: Iterable[Vmm], node_id: str) -> tuple[dict[ProcessId, str], set[str]]:
    """The id of each VM, and the UUIDs that more than one claims: all of those get the pid form."""
    found = list(vmms)
    claims = Counter(vmm.uuid for vmm in found if vmm.uuid)
    doubled = {uuid for uuid, count in claims.items() if count > 1}
    ids = {
        vmm.process: vmm.uuid if vmm.uuid and vmm.uuid not in doubled else f"{node_id}/{vmm.process}" for vmm in found
    }
    return ids, doubled


class Discovery:
    """Remembers what it has looked at; ``sweep`` blocks on /proc, so call it off the event loop."""

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc: Final = proc
        self._first_seen: dict[int, float] = {}
        self._vmms: dict[int, Vmm] = {}
        self._full_sweep_at = 0.0

    def sweep(self) -> list[Vmm]:
        """Every VMM that runs now, by pid."""
        now = time.monotonic()
        pids = list_pids(self._proc)
        full = now >= self._full_sweep_at
        if full:
            self._full_sweep_at = now + FULL_SWEEP_SECONDS
        for pid in self._first_seen.keys() - pids:
            del self._first_seen[pid]
        found: dict[int, Vmm] = {}
        for pid in pids:
            first_seen = self._first_seen.setdefault(pid, now)
            known = self._vmms.get(pid)
            if known is None and not full and now - first_seen > SETTLED_SECONDS:
                continue
            vmm = self._look(pid, known)
            if vmm is not None:
                found[pid] = vmm
        self._vmms = found
        return self._without_forks(found)

    def _look(self, pid: int, known: Vmm | None) -> Vmm | None:
        stat = read_stat(pid, self._proc)
        if stat is None:
            return None
        if known is not None and known.process.start_time_ticks == stat[1]:
            return known
        folder = self._proc / str(pid)
        try:
            comm = (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()
            executable = self._executable(folder)
            if not _VMM_COMM.match(comm) and not _VMM_NAME.match(Path(executable.removesuffix(" (deleted)")).name):
                return None
            with (folder / "cmdline").open("rb") as file:
                argv = file.read(MAX_CMDLINE_BYTES).decode("utf-8", "replace").rstrip("\0").split("\0")
        except OSError:
            return None
        again = read_stat(pid, self._proc)
        if again is None or again[1] != stat[1] or not is_vmm(executable, comm, argv):
            return None
        said = parse_command_line(argv)
        return Vmm(
            ProcessId(pid, stat[1]), said.name or f"pid-{pid}", said.uuid, executable or argv[0], said.memory_bytes
        )

    @staticmethod
    def _executable(folder: Path) -> str:
        try:
            return os.readlink(folder / "exe")
        except PermissionError:
            return ""

    def _without_forks(self, found: dict[int, Vmm]) -> list[Vmm]:
        """Leaves out children of a VMM that are still its copy: they are about to exec, and no VMs of their own.

        Of ``-daemonize``'s two processes the child, which has the VM, appears once the parent has left.
        """
        vmms = []
        for pid, vmm in sorted(found.items()):
            stat = read_stat(pid, self._proc)
            parent = found.get(stat[0]) if stat else None
            if stat and not (parent and (parent.name, parent.uuid) == (vmm.name, vmm.uuid) and vmm.uuid):
                vmms.append(vmm)
        return vmms


def _properties(value: str) -> dict[str, str]:
    """QEMU's ``a=b,c=d``; a comma is written twice to be part of a value."""
    parts = value.replace(",,", "\0").split(",")
    pairs = (part.replace("\0", ",").partition("=") for part in parts)
    return {key: rest for key, equals, rest in pairs if equals}


def _name(value: str) -> str:
    """``guest=NAME,...`` or ``NAME,...``, cut and cleaned: it goes to terminals and logs."""
    first = value.replace(",,", "\0").partition(",")[0].replace("\0", ",")
    name = _properties(value).get("guest") or (first if "=" not in first else "")
    return _UNPRINTABLE.sub("_", name)[:MAX_NAME_CHARACTERS]


def _memory(value: str) -> int:
    """``-m 4096``, ``-m 4G`` or ``-m size=4G,...``: mebibytes unless there is a suffix. 0 for anything else."""
    size = _properties(value).get("size") or value.partition(",")[0]
    match = _SIZE.fullmatch(size)
    return int(match[1]) << _SHIFTS[match[2].upper()] if match else 0


def _uuid(value: str) -> str:
    try:
        return str(uuids.UUID(value))
    except ValueError:
        return ""
