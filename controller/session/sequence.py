# SPDX-License-Identifier: Apache-2.0
"""Sequence numbers of reports on one stream: 1, 2, 3, ... and what to do when they are not."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class Verdict(enum.Enum):
    TAKE = "take"  # in order
    TAKE_AND_RESYNC = "take, but something is missing"  # newer than expected: states are absolute, so still good
    IGNORE = "older than what is known, or a repeat"  # taking it would put the picture back


@dataclass(slots=True)
class Sequence:
    last: int = 0

    def judge(self, sequence: int, full: bool) -> Verdict:
        """Verdict on a report's number, and remember it. A full report closes any gap."""
        if sequence <= self.last:
            return Verdict.IGNORE
        gap = sequence != self.last + 1
        self.last = sequence
        return Verdict.TAKE_AND_RESYNC if gap and not full else Verdict.TAKE
