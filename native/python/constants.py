# SPDX-License-Identifier: Apache-2.0
"""The C interface's enumerations and fixed sizes as Python types. The numbers are those of frostline.h."""

from __future__ import annotations

from enum import IntEnum
from typing import Final

from frostline.native.binding import lib

ABI: Final[int] = lib.FL_ABI
PAGE_BYTES: Final[int] = lib.FL_PAGE_SIZE
AGE_BINS: Final[int] = lib.FL_AGE_BINS
LATENCY_BUCKETS: Final[int] = lib.FL_LATENCY_BUCKETS
RECORDS_MAX: Final[int] = lib.FL_RECORDS_MAX


class Refusal(IntEnum):
    """Why a VM is not served."""

    NONE = lib.FL_REFUSAL_NONE
    GONE = lib.FL_REFUSAL_GONE
    NOT_SHARED_MEMFD = lib.FL_REFUSAL_NOT_SHARED_MEMFD
    PASSTHROUGH = lib.FL_REFUSAL_PASSTHROUGH
    LOCKED = lib.FL_REFUSAL_LOCKED
    OTHER_MAPPER = lib.FL_REFUSAL_OTHER_MAPPER
    FOREIGN_UFFD = lib.FL_REFUSAL_FOREIGN_UFFD
    ALREADY_SERVED = lib.FL_REFUSAL_ALREADY_SERVED
    TRACED = lib.FL_REFUSAL_TRACED
    SECCOMP = lib.FL_REFUSAL_SECCOMP
    PERMISSION = lib.FL_REFUSAL_PERMISSION
    KERNEL = lib.FL_REFUSAL_KERNEL
    VAULT_INVALID = lib.FL_REFUSAL_VAULT_INVALID
    HUGETLB = lib.FL_REFUSAL_HUGETLB
    STUCK = lib.FL_REFUSAL_STUCK
    LIMIT = lib.FL_REFUSAL_LIMIT
    INTERNAL = lib.FL_REFUSAL_INTERNAL

    @property
    def word(self) -> str:
        """The stable lower-case word, e.g. ``not_shared_memfd``."""
        return self.name.lower()

    @classmethod
    def _missing_(cls, value: object) -> Refusal:
        """A number of a newer library: still a refusal, of a kind not known here."""
        return cls.INTERNAL


class Tracker(IntEnum):
    """A way to see which pages are touched."""

    NONE = lib.FL_TRACKER_NONE
    RWP = lib.FL_TRACKER_RWP
    ZAP = lib.FL_TRACKER_ZAP
    IDLE = lib.FL_TRACKER_IDLE
    DAMON = lib.FL_TRACKER_DAMON

    @property
    def word(self) -> str:
        return self.name.lower()


class Freeze(IntEnum):
    """How a page is held still while it is copied out."""

    NONE = lib.FL_FREEZE_NONE
    WP = lib.FL_FREEZE_WP
    RWP = lib.FL_FREEZE_RWP

    @property
    def word(self) -> str:
        return self.name.lower()


class State(IntEnum):
    """State of a VM's pager."""

    STARTING = lib.FL_STATE_STARTING
    ACTIVE = lib.FL_STATE_ACTIVE
    HOLD = lib.FL_STATE_HOLD
    DRAIN = lib.FL_STATE_DRAIN
    CORRUPT = lib.FL_STATE_CORRUPT
    DETACHED = lib.FL_STATE_DETACHED
    RELEASED = lib.FL_STATE_RELEASED

    @property
    def word(self) -> str:
        return self.name.lower()


class Why(IntEnum):
    """Why nothing is evicted right now."""

    EVICTING = lib.FL_WHY_EVICTING
    LEASE = lib.FL_WHY_LEASE
    BUDGET = lib.FL_WHY_BUDGET
    NOTHING_COLD = lib.FL_WHY_NOTHING_COLD
    RATE = lib.FL_WHY_RATE
    BRAKE = lib.FL_WHY_BRAKE
    TIER_FULL = lib.FL_WHY_TIER_FULL
    CORRUPT = lib.FL_WHY_CORRUPT
    DRAIN = lib.FL_WHY_DRAIN
    UNSAFE = lib.FL_WHY_UNSAFE
    FAILED = lib.FL_WHY_FAILED
    NO_TRACKER = lib.FL_WHY_NO_TRACKER

    @property
    def word(self) -> str:
        return self.name.lower()


class RecordKind(IntEnum):
    """What a record in the vault tells of."""

    SCAN = lib.FL_RECORD_SCAN
    APPLY = lib.FL_RECORD_APPLY
    EVICT = lib.FL_RECORD_EVICT
    FAULT = lib.FL_RECORD_FAULT
    DRAIN = lib.FL_RECORD_DRAIN
    PREFETCH = lib.FL_RECORD_PREFETCH
    TAKEOVER = lib.FL_RECORD_TAKEOVER
    ERROR = lib.FL_RECORD_ERROR


class CommandKind(IntEnum):
    """What a pager can be told to do."""

    PING = lib.FL_COMMAND_PING
    BUDGET = lib.FL_COMMAND_BUDGET
    SCAN = lib.FL_COMMAND_SCAN
    PREFETCH = lib.FL_COMMAND_PREFETCH
    DRAIN = lib.FL_COMMAND_DRAIN
    DETACH = lib.FL_COMMAND_DETACH
    RELEASE = lib.FL_COMMAND_RELEASE


class PagerExit(IntEnum):
    """Exit codes of frostline-pager; from REFUSED on, the code less REFUSED is a Refusal."""

    OK = lib.FL_EXIT_OK
    USAGE = lib.FL_EXIT_USAGE
    VM_GONE = lib.FL_EXIT_VM_GONE
    FAILED = lib.FL_EXIT_FAILED
    REFUSED = lib.FL_EXIT_REFUSED


# Lowest age of each bin in scans; a bin ends where the next begins, the last one is open.
AGE_BIN_EDGES: Final[tuple[int, ...]] = tuple(lib.fl_age_bin_edge(index) for index in range(AGE_BINS))
# Upper edge of each fault latency bucket in nanoseconds.
LATENCY_BUCKET_EDGES_NS: Final[tuple[int, ...]] = tuple(
    lib.fl_latency_bucket_edge(index) for index in range(LATENCY_BUCKETS)
)
