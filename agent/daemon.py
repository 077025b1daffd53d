# SPDX-License-Identifier: Apache-2.0
"""The base of a daemon: signal handlers set flags, one cycle does the work."""

from __future__ import annotations

import abc
import asyncio
import contextlib
import signal
import time
from typing import Final


class Daemon(abc.ABC):
    """``run`` until SIGTERM or SIGINT; SIGHUP asks for a reload. A cycle that takes long delays only the next one."""

    def __init__(self, cycle_seconds: float) -> None:
        self._cycle_seconds: Final = cycle_seconds
        self._stop_wanted = False
        self._reload_wanted = False
        self._flag: Final = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            await self._begin()
            while not self._stop_wanted:
                started = time.monotonic()
                self._flag.clear()
                if self._reload_wanted:
                    self._reload_wanted = False
                    await self._reload()
                await self._cycle()
                left = self._cycle_seconds - (time.monotonic() - started)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._flag.wait(), max(0.01, left))
        finally:
            await self._end()

    @property
    def asked_to_stop(self) -> bool:
        """Whether the end is somebody's wish, and not a failure's."""
        return self._stop_wanted

    def stop(self) -> None:
        """End after the present cycle."""
        self._stop_wanted = True
        self._flag.set()

    def reload(self) -> None:
        """Read the configuration files again before the next cycle."""
        self._reload_wanted = True
        self._flag.set()

    @abc.abstractmethod
    async def _begin(self) -> None:
        """Once, before the first cycle."""

    @abc.abstractmethod
    async def _cycle(self) -> None:
        """Everything that is done again and again."""

    @abc.abstractmethod
    async def _reload(self) -> None:
        """The configuration files may have changed."""

    @abc.abstractmethod
    async def _end(self) -> None:
        """Once, whatever happened."""
