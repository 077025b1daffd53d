# SPDX-License-Identifier: Apache-2.0
"""Reading a VM's vault: status and records, whether a pager lives or not."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Final

from frostline.native.binding import NativeError, check, ffi, lib
from frostline.native.constants import PAGE_BYTES, RECORDS_MAX, Freeze, RecordKind, Refusal, State, Tracker, Why


@dataclass(frozen=True, slots=True)
class Status:
    """A consistent copy of ``struct fl_status``: same names, same units (bytes, ns of CLOCK_BOOTTIME, pages)."""

    abi: int
    state: State
    why: Why
    refusal: Refusal
    vmm_pid: int
    pager_pid: int
    pager_alive: bool
    takeovers: int
    now_ns: int
    attached_at_ns: int
    pager_started_ns: int
    takeover_ns: int
    attach_stop_ns: int
    budget_bytes: int
    budget_rate_bytes: int
    budget_generation: int
    budget_lease_until_ns: int
    budget_min_age_ns: int
    brake_permille: int
    tracker_grain: int
    memory_bytes: int
    resident_bytes: int
    swapped_bytes: int
    evicted_pages: int
    evicted_zero_pages: int
    evicted_same_pages: int
    evicted_ram_pages: int
    stored_bytes: int
    pool_bytes: int
    metadata_bytes: int
    scan_interval_ns: int
    scans: int
    last_scan_ns: int
    last_scan_took_ns: int
    scan_failures: int
    tracker: Tracker
    freeze: Freeze
    tracker_switches: int
    arm_ns: int
    harvest_ns: int
    scan_stop_max_ns: int
    sync_windows: int
    sync_long_windows: int
    sync_max_ns: int
    working_set_bytes: int
    resident_age_bytes: tuple[int, ...]
    evicted_age_bytes: tuple[int, ...]
    promotions: tuple[int, ...]
    evictions: int
    evictions_cancelled: int
    rejected_pages: int
    faults: int
    zero_fills: int
    write_faults: int
    minor_faults: int
    prefetched_pages: int
    drained_pages: int
    removed_pages: int
    checksum_errors: int
    poisoned_pages: int
    stale_messages: int
    stall_ns: int
    compacted_pages: int
    recovered_pages: int
    fault_latency: tuple[int, ...]

    @property
    def evicted_bytes(self) -> int:
        """Guest bytes that are away."""
        return self.evicted_pages * PAGE_BYTES

    def lease_remaining_seconds(self, now_ns: int | None = None) -> float:
        """Time until the lease in force runs out; 0 when there is none."""
        now = self.now_ns if now_ns is None else now_ns
        return max(0, self.budget_lease_until_ns - now) / 1e9

    def fault_percentile_ns(self, permille: int) -> int:
        """Time below which ``permille`` of the counted faults were answered; 0 when none were counted."""
        return latency_percentile_ns(self.fault_latency, permille)


@dataclass(frozen=True, slots=True)
class Record:
    """One thing the pager did. Times are ns of CLOCK_BOOTTIME; ``generation`` is the budget's in force then."""

    sequence: int
    kind: RecordKind
    tier: int
    start_ns: int
    end_ns: int
    pages: int
    bytes: int
    page: int
    generation: int


_ENUMS: Final = {
    "state": State,
    "why": Why,
    "refusal": Refusal,
    "pager_alive": bool,
    "tracker": Tracker,
    "freeze": Freeze,
}
_ARRAYS: Final = frozenset({"resident_age_bytes", "evicted_age_bytes", "promotions", "fault_latency"})
STATUS_FIELDS: Final[tuple[str, ...]] = tuple(field.name for field in fields(Status))
RECORD_FIELDS: Final[tuple[str, ...]] = tuple(field.name for field in fields(Record))
_KNOWN_RECORDS: Final = frozenset(int(kind) for kind in RecordKind)


def _status(raw: Any) -> Status:
    values: dict[str, Any] = {}
    for name in STATUS_FIELDS:
        value = getattr(raw, name)
        if name in _ARRAYS:
            values[name] = tuple(value)
        elif name in _ENUMS:
            values[name] = _ENUMS[name](value)
        else:
            values[name] = value
    return Status(**values)


def latency_percentile_ns(buckets: Sequence[int], permille: int) -> int:
    """Time in ns below which ``permille`` (0..1000) of the faults in ``buckets`` lie; 0 when none were counted."""
    return int(lib.fl_latency_percentile(ffi.new("uint64_t[]", list(buckets)), permille))


class View:
    """A read-only mapping of one VMM's vault. Close it, or use it as a context manager."""

    def __init__(self, vmm_pid: int) -> None:
        """Raises NativeError: ENOENT when the VMM has no vault, EPROTO when it has one that cannot be used."""
        out = ffi.new("struct fl_view **")
        check(lib.fl_view_open(vmm_pid, out), f"cannot open the vault of process {vmm_pid}")
        self.vmm_pid: Final = vmm_pid
        self._view: Any = out[0]
        self._out: Final[Any] = ffi.new("struct fl_status *")
        self._records: Final[Any] = ffi.new("struct fl_record[]", RECORDS_MAX)
        self._cursor: Final[Any] = ffi.new("uint64_t *", 0)
        self._lost: Final[Any] = ffi.new("uint64_t *", 0)

    def close(self) -> None:
        if self._view is not None:
            lib.fl_view_close(self._view)
            self._view = None

    def __enter__(self) -> View:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def status(self) -> Status:
        """A consistent copy of the status."""
        check(lib.fl_view_status(self._open(), self._out), f"cannot read the vault of process {self.vmm_pid}")
        try:
            return _status(self._out)
        except ValueError as error:
            raise NativeError(
                errno.EPROTO, f"the vault of process {self.vmm_pid} holds a number not known here: {error}"
            ) from error

    def records(self) -> tuple[list[Record], int]:
        """Records written since the last call, oldest first, and how many were overwritten before this could."""
        count = check(
            lib.fl_view_records(self._open(), self._cursor, self._records, RECORDS_MAX, self._lost),
            f"cannot read the records of process {self.vmm_pid}",
        )
        found = []
        for raw in self._records[0:count]:
            if raw.kind in _KNOWN_RECORDS:
                values = {name: getattr(raw, name) for name in RECORD_FIELDS}
                values["kind"] = RecordKind(raw.kind)
                found.append(Record(**values))
        return found, int(self._lost[0])

    def _open(self) -> Any:
        if self._view is None:
            raise ValueError(f"the view of process {self.vmm_pid} is closed")
        return self._view
