# SPDX-License-Identifier: Apache-2.0
"""How long to wait before trying again: for dialling the controller, and for starting a VM's next pager.

Dialling follows gRPC's connection back-off (1 s, x 1.6, at most 120 s, +-20 %). The first wait after a session
that was up is spread over the whole first step, so that a fleet does not come back in one instant.
"""

from __future__ import annotations

import random
from typing import Final

FIRST_SECONDS: Final = 1.0
FACTOR: Final = 1.6
MOST_SECONDS: Final = 120.0
JITTER: Final = 0.2

# A pager that dies again within this time of its start counts as failing repeatedly. Whoever served for a second works:
# a kill now and then must not cost the VM a wait.
STABLE_SECONDS: Final = 1.0
RESTART_FIRST_SECONDS: Final = 0.05
RESTART_MOST_SECONDS: Final = 1.0


class DialBackoff:
    """Waits between attempts to reach the controller."""

    def __init__(self, rng: random.Random | None = None) -> None:
        self._random: Final = rng or random.Random()
        self._next = FIRST_SECONDS
        self._was_up = False

    def connected(self) -> None:
        """A session came up: start over, and spread the first wait after it."""
        self._next = FIRST_SECONDS
        self._was_up = True

    def wait_seconds(self, asked_seconds: float = 0.0) -> float:
        """The next wait; never less than what the controller ``asked`` for (RetryInfo), jitter comes on top."""
        step = self._next
        self._next = min(step * FACTOR, MOST_SECONDS)
        if self._was_up:
            self._was_up = False
            wait = self._random.uniform(0.0, step)
        else:
            wait = step * self._random.uniform(1.0 - JITTER, 1.0 + JITTER)
        asked = min(max(0.0, asked_seconds), MOST_SECONDS)
        if wait < asked:
            wait = asked * self._random.uniform(1.0, 1.0 + JITTER)
        return wait


class RestartBackoff:
    """Waits before a VM's next pager: none at first, for vCPUs may hang; growing only while pagers keep failing.

    It never gives up: a VM with pages away has nobody else to bring them back.
    """

    def __init__(self) -> None:
        self._failures = 0

    @property
    def failures(self) -> int:
        """Pagers in a row that did not live for STABLE_SECONDS."""
        return self._failures

    def wait_seconds(self, lived_seconds: float, most_seconds: float = RESTART_MOST_SECONDS) -> float:
        """How long to wait after a pager that lived this long; never more than ``most_seconds``."""
        if lived_seconds >= STABLE_SECONDS:
            self._failures = 0
            return 0.0
        self._failures += 1
        if self._failures == 1:
            return 0.0
        doublings = min(self._failures - 2, 16)
        return float(min(RESTART_FIRST_SECONDS * 2**doublings, most_seconds))
