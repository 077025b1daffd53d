# SPDX-License-Identifier: Apache-2.0
"""The memory cgroup that a process is charged to: where it is, who else is in it, and whether it may swap."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# Files of cgroups are short, but somebody else's processes and mounts decide how short.
MAX_FILE_BYTES: Final = 256 * 1024
MAX_FOLDERS: Final = 64
# Below this many pages of swap left, the kernel does not look for cold anonymous memory at all (MIN_LRU_BATCH).
MIN_SWAP_PAGES: Final = 64
_ESCAPE: Final = re.compile(r"\\([0-7]{3})")


class NoGroupError(Exception):
    """The group cannot be found, or nothing can be said of it; the message is a sentence."""


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """``path`` as this process's cgroup namespace names it; ``inode`` is the group's id for the kernel."""

    path: str
    folder: Path
    inode: int
    mount: Path
    unified: bool  # cgroup v2


def find_group(pid: int, proc: Path = Path("/proc")) -> MemoryGroup:
    """The memory cgroup of a process, v1 or v2. Raises NoGroupError."""
    path, unified = _own_path(pid, proc)
    if ".." in path.split("/"):
        raise NoGroupError(f"its cgroup {path} lies outside of this agent's cgroup namespace")
    mount, below = _mount(path, unified, proc)
    folder = mount / below
    # In v2 a group without a memory controller of its own is charged to the nearest one above that has one.
    while unified and folder != mount and not (folder / "memory.stat").exists():
        folder, path = folder.parent, path.rpartition("/")[0] or "/"
    try:
        return MemoryGroup(path, folder, folder.stat().st_ino, mount, unified)
    except OSError as error:
        raise NoGroupError(f"its cgroup {folder} cannot be read: {error.strerror}") from None


def other_processes(group: MemoryGroup, pid: int) -> int:
    """How many processes beside ``pid`` are charged to the group, as far as can be seen."""
    found: set[int] = set()
    for folder in _charged_folders(group):
        try:
            found |= {int(word) for word in _read(folder / "cgroup.procs").split() if word.isdecimal()}
        except OSError:
            continue  # a threaded group's processes stand in its parent's list
    return len(found - {pid})


def why_not_aged(group: MemoryGroup, proc: Path = Path("/proc")) -> str:
    """Why the kernel does not sort the group's anonymous and shared memory by age; empty when it does.

    It only looks for cold memory of that kind where it could swap it out; elsewhere its generations go round without
    a meaning (seen on Linux 7.3: pages that nobody had touched moved from the oldest to the youngest).
    """
    try:
        fields = dict(line.split(":", 1) for line in _read(proc / "meminfo").splitlines() if ":" in line)
        if int(fields.get("SwapFree", "0").split()[0]) * 1024 < MIN_SWAP_PAGES * _PAGE_BYTES:
            return "this host has no swap, or none left; without it the kernel does not age guest memory"
        swappiness = proc / "sys/vm/swappiness" if group.unified else group.folder / "memory.swappiness"
        if swappiness.exists() and int(_read(swappiness)) == 0:
            return f"{swappiness} is 0; with that the kernel does not age guest memory"
        for folder in _upwards(group) if group.unified else ():
            most, used = folder / "memory.swap.max", folder / "memory.swap.current"
            text = _read(most).strip() if most.exists() else "max"
            if text != "max" and int(text) - int(_read(used)) < MIN_SWAP_PAGES * _PAGE_BYTES:
                return f"{most} leaves it no swap; without it the kernel does not age guest memory"
    except (OSError, ValueError) as error:
        return f"whether cgroup {group.path} may swap cannot be found out: {error}"
    return ""


_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


def _own_path(pid: int, proc: Path) -> tuple[str, bool]:
    try:
        lines = _read(proc / str(pid) / "cgroup").splitlines()
    except OSError as error:
        raise NoGroupError(f"its cgroup cannot be read: {error.strerror}") from None
    unified = ""
    for line in lines:
        _number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            return path, False
        if not controllers:
            unified = path
    if not unified:
        raise NoGroupError("it is in no memory cgroup: the kernel has none, or none is mounted")
    return unified, True


def _mount(path: str, unified: bool, proc: Path) -> tuple[Path, str]:
    """Where the hierarchy is mounted, and the way from there to ``path``."""
    try:
        lines = _read(proc / "self/mountinfo").splitlines()
    except OSError as error:
        raise NoGroupError(f"mounts cannot be read: {error.strerror}") from None
    for line in lines:
        before, _, after = line.partition(" - ")
        left, right = before.split(" "), after.split(" ")
        if len(left) < 5 or len(right) < 3:
            continue
        fits = right[0] == "cgroup2" if unified else right[0] == "cgroup" and "memory" in right[2].split(",")
        root = _unescaped(left[3]).rstrip("/")
        if fits and (path == root or path.startswith(f"{root}/")):
            return Path(_unescaped(left[4])), path[len(root) :].strip("/")
    raise NoGroupError(f"the hierarchy of its cgroup {path} is not mounted here")


def _charged_folders(group: MemoryGroup) -> Iterator[Path]:
    """The group's own folder, and in v2 those below it that have no memory controller of their own."""
    waiting = [group.folder]
    for _ in range(MAX_FOLDERS):
        if not waiting:
            return
        folder = waiting.pop()
        yield folder
        if group.unified:
            try:
                below = [folder / entry.name for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
            waiting += [each for each in below if not (each / "memory.stat").exists()][:MAX_FOLDERS]


def _upwards(group: MemoryGroup) -> Iterator[Path]:
    folder = group.folder
    while folder != group.mount:
        yield folder
        folder = folder.parent


def _read(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES).decode("utf-8", "surrogateescape")


def _unescaped(text: str) -> str:
    """Spaces and backslashes are written in octal in mountinfo."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 8)), text)
