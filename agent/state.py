# SPDX-License-Identifier: Apache-2.0
"""What the agent must not forget across restarts: the epoch fence, and which VMs the policy keeps it away from.

Written to a temporary file, synced, renamed. A file that cannot be read still fences: every number that can be
salvaged from it, its predecessor and its unfinished successor counts, and the highest wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

FORMAT: Final = 1
MAX_FILE_BYTES: Final = 4 * 2**20
MAX_UINT64: Final = 2**64 - 1
MAX_OFF_VMS: Final = 4096
_EPOCH: Final = re.compile(r'"highest_epoch"\s*:\s*(\d{1,20})')


@dataclass(frozen=True, slots=True)
class AgentState:
    """``off_vm_ids``: VMs that the last set kept off; they stay unattached until a set says otherwise."""

    highest_epoch: int = 0
    applied_version: int = 0
    off_vm_ids: frozenset[str] = field(default_factory=frozenset)


class StateError(OSError):
    """The state file cannot be written; the fence would not survive a restart."""


class StateFile:
    """Owns one state file. ``warning`` says what was wrong with what was found, empty when nothing was."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.warning = ""
        self.state = self._load()

    def update(self, **changes: Any) -> None:
        """Change fields and, if that changed anything, have it on disk before returning. Raises StateError."""
        changed = replace(self.state, **changes)
        if changed.highest_epoch < self.state.highest_epoch:
            raise ValueError(f"the epoch fence cannot go back from {self.state.highest_epoch}")
        if changed != self.state:
            self._store(changed)
            self.state = changed

    def _load(self) -> AgentState:
        try:
            raw = _read(self.path)
        except FileNotFoundError:
            floor = self._salvage()
            return AgentState(highest_epoch=floor)
        except OSError as error:
            raise StateError(error.errno, f"cannot read {self.path}: {error.strerror}") from error
        try:
            return _parse(raw)
        except ValueError as error:
            floor = self._salvage()
            kept = self.path.with_suffix(".corrupt")
            with contextlib.suppress(OSError):
                os.replace(self.path, kept)
            self.warning = (
                f"{self.path} is damaged ({error}); it is kept as {kept}. Budget sets below epoch {floor} are refused"
                if floor
                else f"{self.path} is damaged ({error}) and no epoch could be salvaged; it is kept as {kept}. "
                "The fence starts anew with the next controller"
            )
            return AgentState(highest_epoch=floor)

    def _salvage(self) -> int:
        """The highest epoch that any of the files mentions."""
        highest = 0
        for path in (self.path, self._previous, self._unfinished):
            with contextlib.suppress(OSError):
                found = _EPOCH.findall(_read(path).decode("utf-8", "replace"))
                highest = max([highest, *(value for value in map(int, found) if value <= MAX_UINT64)])
        return highest

    def _store(self, state: AgentState) -> None:
        body = {
            "format": FORMAT,
            "highest_epoch": state.highest_epoch,
            "applied_version": state.applied_version,
            "off_vm_ids": sorted(state.off_vm_ids)[:MAX_OFF_VMS],
        }
        data = json.dumps(body, indent=1).encode() + b"\n"
        try:
            descriptor = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
            try:
                view = memoryview(data)
                while view:
                    view = view[os.write(descriptor, view) :]
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            with contextlib.suppress(FileNotFoundError):
                self._previous.unlink()
            with contextlib.suppress(FileNotFoundError):
                os.link(self.path, self._previous)
            os.replace(self._unfinished, self.path)
            folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise StateError(error.errno, f"cannot write {self.path}: {error.strerror}") from error

    @property
    def _previous(self) -> Path:
        return self.path.with_suffix(".previous")

    @property
    def _unfinished(self) -> Path:
        return self.path.with_suffix(".tmp")


def _read(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE_BYTES)


def _parse(raw: bytes) -> AgentState:
    body = json.loads(raw)
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise ValueError("not a state file of this version")
    epoch, version, off = (body.get(key) for key in ("highest_epoch", "applied_version", "off_vm_ids"))
    for number in (epoch, version):
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number <= MAX_UINT64:
            raise ValueError(f"{number!r} is not an epoch or version")
    if not isinstance(off, list) or not all(isinstance(vm_id, str) for vm_id in off):
        raise ValueError("off_vm_ids is not a list of ids")
    return AgentState(int(str(epoch)), int(str(version)), frozenset(off[:MAX_OFF_VMS]))
