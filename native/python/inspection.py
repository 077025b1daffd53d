# SPDX-License-Identifier: Apache-2.0
"""Looking at a VMM and at the kernel without touching either."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from frostline.native.binding import check, ffi, lib, text
from frostline.native.constants import Refusal, Tracker


@dataclass(frozen=True, slots=True)
class Region:
    """A run of guest RAM: VMM addresses, and where they lie in the memfd. Bytes, but for ``first_page``."""

    vmm_addr: int
    length: int
    file_offset: int
    inode: int
    first_page: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """What was found about one VMM. ``detail`` is a sentence for people."""

    refusal: Refusal
    regions: tuple[Region, ...]
    memory_bytes: int
    start_time_ticks: int
    uid: int
    seccomp_mode: int
    served_by_pid: int
    has_vault: bool
    detail: str


@dataclass(frozen=True, slots=True)
class KernelFeatures:
    """What this kernel allows this process, found by trying; ``raw_features`` is uffdio_api.features.

    The ``_lacks`` are sentences: why a feature is not there, or which part of it does not work; empty when it is there.
    """

    userfaultfd_device: bool
    userfaultfd_syscall: bool
    missing_shmem: bool
    minor_shmem: bool
    wp_shmem: bool
    poison: bool
    move: bool
    rwp: bool
    events: bool
    pagemap_scan: bool
    idle_page_tracking: bool
    damon_vaddr: bool
    ptrace_seccomp_filter: bool
    raw_features: int
    wp_lacks: str
    rwp_lacks: str
    pagemap_scan_lacks: str
    idle_lacks: str
    damon_lacks: str


@dataclass(frozen=True, slots=True)
class TrackerProbe:
    """Whether a tracker can be used; ``detail`` says what it gives, or what is missing."""

    tracker: Tracker
    possible: bool
    detail: str


def library_version() -> str:
    """Version of the C library, e.g. ``0.1.0``."""
    return text(lib.fl_version())


def inspect(pid: int) -> Inspection:
    """Look at a process; a refusal is an answer, not an error. Reads all of /proc: call it off the event loop."""
    out = ffi.new("struct fl_inspection *")
    check(lib.fl_inspect(pid, out), f"cannot inspect process {pid}")
    regions = tuple(
        Region(
            vmm_addr=region.vmm_addr,
            length=region.length,
            file_offset=region.file_offset,
            inode=region.inode,
            first_page=region.first_page,
        )
        for region in out.regions[0 : out.region_count]
    )
    return Inspection(
        refusal=Refusal(out.refusal),
        regions=regions,
        memory_bytes=out.memory_bytes,
        start_time_ticks=out.start_time_ticks,
        uid=out.uid,
        seccomp_mode=out.seccomp_mode,
        served_by_pid=out.served_by_pid,
        has_vault=bool(out.has_vault),
        detail=text(out.detail),
    )


def probe_kernel() -> KernelFeatures:
    """Try this kernel's features with throwaway descriptors and pages."""
    out = ffi.new("struct fl_kernel_features *")
    check(lib.fl_probe_kernel(out), "cannot probe the kernel")
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(KernelFeatures)):
        value = getattr(out, name)
        values[name] = text(value) if name.endswith("_lacks") else value if name == "raw_features" else bool(value)
    return KernelFeatures(**values)


def probe_trackers(pid: int = 0, memory_bytes: int = 0, scan_interval_ms: int = 0) -> tuple[TrackerProbe, ...]:
    """What each tracker would do for a pager that starts at a process as it is now (0: at any VM of this host).

    The preferred one first. ``memory_bytes`` (0: unknown) and ``scan_interval_ms`` (0: the pager's own) are for a VM
    that nobody is attached to; of others the vault knows.
    """
    out = ffi.new("struct fl_tracker_probe[]", lib.FL_TRACKERS)
    error = lib.fl_probe_trackers(pid, memory_bytes, scan_interval_ms, out)
    check(error, f"cannot probe the trackers for process {pid}")
    return tuple(
        TrackerProbe(tracker=Tracker(probe.tracker), possible=bool(probe.possible), detail=text(probe.detail))
        for probe in out
        if probe.tracker
    )


def tidy_host() -> None:
    """Put back what pagers that were killed have left changed on this host (DAMON), unless a living one needs it."""
    lib.fl_tidy_host()
