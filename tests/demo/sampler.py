# SPDX-License-Identifier: Apache-2.0
"""Looks at both guests several times a second, in a thread of its own, at the sources that cannot be fooled:
the blocks of the memfds, the guests' own counts, the vaults, and the controller's API."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import grpc

from frostline.native import State, Status
from frostline.v1 import operator_pb2
from tests.system.guest import Guest, GuestError
from tests.system.guest import Status as GuestStatus
from tests.system.world import World, WorldError

PERIOD_SECONDS: Final = 0.2
HISTORY: Final = 600
API_SECONDS: Final = 2.0


@dataclass(frozen=True)
class VmSample:
    """One VM at one moment; what is not there yet is None."""

    memfd_bytes: int = 0
    workload: GuestStatus | None = None
    vault: Status | None = None
    vm: operator_pb2.Vm | None = None

    @property
    def evicted_bytes(self) -> int:
        return self.vault.evicted_bytes if self.vault else 0

    @property
    def pool_bytes(self) -> int:
        return self.vault.pool_bytes if self.vault else 0

    @property
    def planned_bytes(self) -> int:
        return self.vm.decision.planned_bytes if self.vm else 0


@dataclass(frozen=True)
class Sample:
    """Both VMs at one moment of the story (seconds since its start)."""

    at: float = 0.0
    busy: VmSample = VmSample()
    quiet: VmSample = VmSample()


@dataclass
class Losses:
    """What the excluded VM must never have: attached at all, pages evicted, or fewer blocks than before."""

    attached: bool = False
    evictions: int = 0
    shrunk_bytes: int = 0
    most_bytes: int = 0

    def note(self, sample: VmSample) -> None:
        self.most_bytes = max(self.most_bytes, sample.memfd_bytes)
        if sample.memfd_bytes:
            self.shrunk_bytes = max(self.shrunk_bytes, self.most_bytes - sample.memfd_bytes)
        if sample.vault is not None:
            self.attached = True
            self.evictions = max(self.evictions, sample.vault.evictions)

    @property
    def none(self) -> bool:
        return not self.attached and not self.evictions and not self.shrunk_bytes


class Sampler:
    """Start it when both guests are started; ``stop`` before the world ends."""

    def __init__(self, world: World, busy: Guest, quiet: Guest) -> None:
        self.latest = Sample()
        self.history: Final[deque[Sample]] = deque(maxlen=HISTORY)
        self.losses: Final = Losses()
        self._world: Final = world
        self._busy: Final = busy
        self._quiet: Final = quiet
        self._started: Final = time.monotonic()
        self._changed: Final = threading.Condition()
        self._ending: Final = threading.Event()
        self._problem: BaseException | None = None
        self._thread: Final = threading.Thread(target=self._run, name="sampler", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._ending.set()
        self._thread.join(timeout=10)

    def until(self, what: str, wanted: Callable[[Sample], bool], seconds: float) -> Sample:
        """The first sample from now on for which ``wanted`` is true."""
        deadline = time.monotonic() + seconds
        with self._changed:
            while True:
                left = deadline - time.monotonic()
                if self._problem is not None:
                    raise WorldError(f"watching failed: {self._problem!r}") from self._problem
                for guest in (self._busy, self._quiet):
                    if not guest.alive():
                        raise WorldError(f"a guest ended while waiting for: {what}\n{guest.describe()}")
                if left <= 0:
                    raise WorldError(f"not within {seconds:g} s: {what}\n{self._world.words()}")
                if self._changed.wait(min(left, 1.0)) and wanted(self.latest):
                    return self.latest

    def pause(self, seconds: float) -> Sample:
        """Let the story go on for a while."""
        started = time.monotonic()
        return self.until("time to pass", lambda _: time.monotonic() - started >= seconds, seconds + 10)

    def _run(self) -> None:
        try:
            while not self._ending.wait(PERIOD_SECONDS):
                busy, quiet = self._look(self._busy), self._look(self._quiet)
                with self._changed:
                    self.losses.note(quiet)
                    self.latest = Sample(time.monotonic() - self._started, busy, quiet)
                    self.history.append(self.latest)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._problem = error
                self._changed.notify_all()

    def _look(self, guest: Guest) -> VmSample:
        workload = vm = None
        with contextlib.suppress(GuestError):  # it still boots
            workload = guest.status()
        with contextlib.suppress(grpc.RpcError):  # the controller may be away; the rest is seen all the same
            vm = self._world.vm(guest, API_SECONDS)
        vault = self._world.status(guest)
        if vault is not None and vault.state is State.DETACHED:
            self._world.forget_view(guest)
            vault = None
        return VmSample(guest.memfd_resident_bytes(), workload, vault, vm)
