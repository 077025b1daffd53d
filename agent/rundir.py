# SPDX-License-Identifier: Apache-2.0
"""The run folder: who may use it, what is in it, and the lock that keeps a second agent out."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Final


class RunDirError(OSError):
    """The run folder cannot be used; the message says what to do."""


class RunDir:
    """Holds the folder's lock until ``close``, or until this process ends in whatever way."""

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        self.sockets: Final = path / "pagers"
        self.logs: Final = path / "log"
        for folder in (path, self.sockets, self.logs):
            _own_folder(folder)
        self._descriptor = self._lock()

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _lock(self) -> int:
        name = self.path / "agent.lock"
        try:
            descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise RunDirError(error.errno, f"cannot open {name}: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.read(descriptor, 32).decode("ascii", "replace").strip() or "unknown"
            os.close(descriptor)
            raise RunDirError(
                error.errno,
                f"another agent (pid {holder}) has {self.path}; stop that one, or use another --run-dir "
                "(two agents on one host see each other's VMs as served elsewhere)",
            ) from error
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor


def _own_folder(path: Path) -> None:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = path.lstat()
    except OSError as error:
        raise RunDirError(
            error.errno, f"cannot create {path}: {error.strerror}; run as root, or choose another --run-dir"
        ) from error
    if not path.is_dir() or path.is_symlink():
        raise RunDirError(20, f"{path} is not a folder; choose another --run-dir")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise RunDirError(
            1,
            f"{path} belongs to uid {found.st_uid} with mode {found.st_mode & 0o777:o}; whoever can write there could "
            "command pagers: give it to this user with mode 0700, or choose another --run-dir",
        )
