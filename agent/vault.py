# SPDX-License-Identifier: Apache-2.0
"""Reading the vault of one VM, which comes with attaching and goes with detaching, pager alive or not."""

from __future__ import annotations

import errno
from typing import Final

import structlog

from frostline.native import NativeError, Record, State, Status, View

_log: Final = structlog.stdlib.get_logger("frostline.agent.vault")


class VaultReader:
    """``status`` is the last one read; None while there is no vault."""

    def __init__(self, pid: int) -> None:
        self._pid: Final = pid
        self._view: View | None = None
        self._said = ""
        self.status: Status | None = None

    @property
    def found(self) -> bool:
        """Whether a vault is open: somebody attached to the VM before."""
        return self._view is not None

    def open(self) -> bool:
        """Find the vault if it is not open yet; True when the VM is attached to."""
        if self._view is None:
            try:
                self._view = View(self._pid)
            except NativeError as error:
                if error.errno not in (errno.ENOENT, errno.ESRCH):
                    self._say("the vault cannot be opened", error)
                return False
        self.refresh()
        return self.status is not None and self.status.state is not State.DETACHED

    def refresh(self) -> None:
        """Read the status."""
        if self._view is not None:
            try:
                self.status = self._view.status()
            except NativeError as error:
                self._say("the vault cannot be read", error)
                self._drop()

    def read(self) -> tuple[list[Record], int]:
        """Read the status, and give back new records and how many were lost."""
        self.refresh()
        if self._view is None:
            return [], 0
        try:
            return self._view.records()
        except NativeError as error:
            self._say("the vault cannot be read", error)
            self._drop()
            return [], 0

    def close(self) -> None:
        """The VM has ended, or is detached."""
        self._drop()
        self.status = None

    def _drop(self) -> None:
        view, self._view = self._view, None
        if view is not None:
            view.close()

    def _say(self, what: str, error: NativeError) -> None:
        if str(error) != self._said:
            self._said = str(error)
            _log.warning(what, why=str(error))
