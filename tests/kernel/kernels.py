# SPDX-License-Identifier: Apache-2.0
"""Booted kernels for tests, one at a time: another one when a test, or the emulator, has broken the last."""

from types import TracebackType
from typing import Self

import pytest

from tests.conftest import why_no_guest
from tests.system.guest.kernel import GuestKernel

from .boot import Kernel, KernelConfig


class Kernels:
    """A context manager, called for a kernel that is in order. Skips where none can be booted."""

    def __init__(
        self, config: KernelConfig, folders: pytest.TempPathFactory, name: str, tested: GuestKernel | None = None
    ) -> None:
        """``name``: of the folders. ``tested``: the newest Debian one by default."""
        self._config = config
        self._folders = folders
        self._name = name
        self._tested = tested
        self._booted: Kernel | None = None

    def __enter__(self) -> Self:
        reason = why_no_guest()
        if reason is not None:
            pytest.skip(reason)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def end(self) -> None:
        """The next call boots another one, whatever state this one is in."""
        booted, self._booted = self._booted, None
        if booted is not None:
            booted.__exit__(None, None, None)

    def __call__(self) -> Kernel:
        """The one that is booted, unless it has panicked, warned, hung or stopped; then the next."""
        if self._booted is not None and self._booted.broken() is not None:
            self.end()
        if self._booted is None:
            self._booted = Kernel(self._config, self._folders.mktemp(self._name), self._tested).__enter__()
        return self._booted
