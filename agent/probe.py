# SPDX-License-Identifier: Apache-2.0
"""What this kernel and each VMM allow, and the tracker and freeze method that follow from it."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Final

from frostline.agent.discovery import Discovery, Vmm
from frostline.native import Inspection, KernelFeatures, NativeError, Refusal, inspect, probe_kernel


@dataclass(frozen=True, slots=True)
class Feature:
    """A kernel feature: whether it is there, whether serving needs it, and what it is for."""

    name: str
    there: bool
    needed: bool
    purpose: str


@dataclass(frozen=True, slots=True)
class Tracker:
    """A way of seeing accesses: whether this kernel could, and what is in the way if it could not."""

    name: str
    chosen: bool
    kernel_allows: bool
    why: str


@dataclass(frozen=True, slots=True)
class VmmFinding:
    """One VMM: served, could be, or refused and why."""

    pid: int
    name: str
    uuid: str
    executable: str
    served_by_pid: int
    has_vault: bool
    memory_bytes: int
    regions: int
    refusal: str
    sentence: str


@dataclass(frozen=True, slots=True)
class Probe:
    """Everything that `frostline-agent probe` says. ``able`` is False when no VM can be served here."""

    able: bool
    kernel_release: str
    features: tuple[Feature, ...]
    trackers: tuple[Tracker, ...]
    freeze_method: str
    freeze_why: str
    vmms: tuple[VmmFinding, ...]

    def document(self) -> dict[str, Any]:
        return asdict(self)


# Field of KernelFeatures, needed now, what for.
_FEATURES: Final[tuple[tuple[str, bool, str], ...]] = (
    ("userfaultfd_device", False, "hand the device into VMMs that run as another user"),
    ("userfaultfd_syscall", False, "userfaultfd in VMMs that may call it themselves"),
    ("missing_shmem", True, "serve faults on evicted pages of a memfd"),
    ("wp_shmem", True, "freeze pages while they are copied out; makes the zap tracker exact"),
    ("events", True, "learn when the VMM frees or moves guest memory"),
    ("pagemap_scan", True, "read which pages were touched"),
    ("minor_shmem", False, "the rwp tracker's freeze"),
    ("poison", False, "poison a page whose stored copy is damaged, instead of ending the VM's access with a signal"),
    ("move", False, "private guest memory, later"),
    ("rwp", False, "the rwp tracker (Linux 7.3)"),
    ("idle_page_tracking", False, "the idle tracker"),
    ("damon_vaddr", False, "the damon tracker"),
    ("ptrace_seccomp_filter", False, "see what a sandboxed VMM's filter forbids before attaching"),
)


def features(kernel: KernelFeatures) -> tuple[Feature, ...]:
    """The kernel's features as a table."""
    return tuple(Feature(name, bool(getattr(kernel, name)), needed, why) for name, needed, why in _FEATURES)


def trackers(kernel: KernelFeatures) -> tuple[Tracker, ...]:
    """The tracker that is chosen, and what speaks for and against the others here."""
    zap = kernel.pagemap_scan and kernel.wp_shmem
    return (
        Tracker(
            "zap",
            zap,
            zap,
            "works on any kernel with WP on shmem, and is exact to a page because the range is registered WP"
            if zap
            else "needs PAGEMAP_SCAN and WP on shmem, which this kernel lacks",
        ),
        Tracker("rwp", False, kernel.rwp, _other(kernel.rwp, "userfaultfd RWP, which comes with Linux 7.3")),
        Tracker("damon", False, kernel.damon_vaddr, _other(kernel.damon_vaddr, "CONFIG_DAMON_VADDR")),
        Tracker(
            "idle", False, kernel.idle_page_tracking, _other(kernel.idle_page_tracking, "CONFIG_IDLE_PAGE_TRACKING")
        ),
    )


def probe() -> Probe:
    """Look at the kernel and at every VMM. Touches neither; reads all of /proc."""
    kernel = probe_kernel()
    table = features(kernel)
    opens = kernel.userfaultfd_device or kernel.userfaultfd_syscall
    able = opens and all(feature.there for feature in table if feature.needed)
    freeze = "wp" if kernel.wp_shmem else "none"
    return Probe(
        able=able,
        kernel_release=os.uname().release,
        features=table,
        trackers=trackers(kernel),
        freeze_method=freeze,
        freeze_why=(
            "write-protection also covers pages that are in the file but not mapped, so no first write is lost"
            if kernel.wp_shmem
            else "this kernel cannot write-protect shmem through userfaultfd"
        ),
        vmms=tuple(_finding(vmm) for vmm in Discovery().sweep()),
    )


def _other(there: bool, needs: str) -> str:
    return f"this kernel has it; not part of this version yet (needs {needs})" if there else f"needs {needs}"


def _finding(vmm: Vmm) -> VmmFinding:
    try:
        found: Inspection | None = inspect(vmm.process.pid)
        failure = ""
    except NativeError as error:
        found, failure = None, str(error)
    if found is None:
        return VmmFinding(vmm.process.pid, vmm.name, vmm.uuid, vmm.executable, 0, False, 0, 0, "internal", failure)
    served = found.refusal is Refusal.ALREADY_SERVED or found.served_by_pid > 0
    return VmmFinding(
        pid=vmm.process.pid,
        name=vmm.name,
        uuid=vmm.uuid,
        executable=vmm.executable,
        served_by_pid=found.served_by_pid,
        has_vault=found.has_vault,
        memory_bytes=found.memory_bytes,
        regions=len(found.regions),
        refusal="" if served or not found.refusal else found.refusal.word,
        sentence=found.detail or ("served now" if served else "can be served"),
    )
