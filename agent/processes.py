# SPDX-License-Identifier: Apache-2.0
"""Watching processes by pidfd: their end is seen at once, and a reused pid is never taken for the old one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Final

from frostline.agent.procfs import ProcessId, read_stat


class ProcessWatch:
    """Sets ``gone`` and calls ``on_gone`` once, on the event loop, when the process has ended."""

    def __init__(self, process: ProcessId, on_gone: Callable[[], None]) -> None:
        """A process that has ended already is gone at once; ``on_gone`` is still called from the loop, later."""
        self.process: Final = process
        self.gone: Final = asyncio.Event()
        self._on_gone: Final = on_gone
        self._loop: Final = asyncio.get_running_loop()
        self._descriptor = -1
        try:
            self._descriptor = os.pidfd_open(process.pid)
        except ProcessLookupError:
            self._loop.call_soon(self._end)
            return
        stat = read_stat(process.pid)
        if stat is None or stat[1] != process.start_time_ticks:
            self._close()
            self._loop.call_soon(self._end)
            return
        self._loop.add_reader(self._descriptor, self._end)

    def send_signal(self, number: signal.Signals) -> None:
        """Signal exactly this process; nothing happens when it is gone."""
        if self._descriptor >= 0 and not self.gone.is_set():
            try:
                signal.pidfd_send_signal(self._descriptor, number)
            except ProcessLookupError:
                return

    def close(self) -> None:
        """Stop watching. The process lives on; ``on_gone`` is not called any more."""
        self._close()

    def _end(self) -> None:
        self._close()
        if not self.gone.is_set():
            self.gone.set()
            self._on_gone()

    def _close(self) -> None:
        if self._descriptor >= 0:
            self._loop.remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1
