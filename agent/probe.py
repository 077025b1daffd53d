# SPDX-License-Identifier: Apache-2.0
"""What this kernel and each VMM allow, and the tracker and freeze method that follow from it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Final

from frostline.agent.discovery import Discovery, Vmm
from frostline.agent.mglru import ColdEstimate, Mglru
from frostline.agent.trackers import freeze_for, preferred, trackers_text, why_preferred
from frostline.agent.wanted import Wanted
from frostline.native import (
    Freeze,
    KernelFeatures,
    NativeError,
    Refusal,
    State,
    Status,
    Tracker,
    TrackerProbe,
    View,
    inspect,
    probe_kernel,
    probe_trackers,
)


@dataclass(frozen=True, slots=True)
class Feature:
    """A kernel feature: whether it works, whether serving needs it, what it is for, and why it is not there."""

    name: str
    there: bool
    needed: bool
    purpose: str
    lacks: str = ""  # also names the part that does not work of what the kernel offers


@dataclass(frozen=True, slots=True)
class TrackerFinding:
    """One way of seeing accesses: ``detail`` says what it gives, or what it lacks."""

    name: str
    possible: bool
    wanted: bool  # it is among those that pagers may use
    chosen: bool  # in use, or what a new pager would take
    detail: str


@dataclass(frozen=True, slots=True)
class VmmFinding:
    """One VMM: served, could be, or refused and why; and how its accesses are, or would be, seen."""

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
    tracker: str = ""  # empty: none, or refused
    tracker_in_use: bool = False
    tracker_why: str = ""
    freeze_method: str = ""
    trackers: tuple[TrackerFinding, ...] = ()
    cold_estimate: dict[str, Any] | None = None  # as in `status`; only of a VM that nobody is attached to
    no_estimate_why: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """Everything that `frostline-agent probe` says. ``able`` is False when no VM can be served here."""

    able: bool
    kernel_release: str
    features: tuple[Feature, ...]
    trackers_wanted: str
    trackers_from: str  # who wants them
    trackers: tuple[TrackerFinding, ...]
    tracker: str
    tracker_why: str
    freeze_method: str
    freeze_why: str
    mglru: str  # whether the kernel's generations can tell anything here
    vmms: tuple[VmmFinding, ...]

    def document(self) -> dict[str, Any]:
        return asdict(self)


# Field of KernelFeatures, needed now, what for.
_FEATURES: Final[tuple[tuple[str, bool, str], ...]] = (
    ("userfaultfd_device", False, "hand the device into VMMs that run as another user"),
    ("userfaultfd_syscall", False, "userfaultfd in VMMs that may call it themselves"),
    ("missing_shmem", True, "serve faults on evicted pages of a memfd"),
    ("wp_shmem", True, "freeze pages while they are copied out; makes zap exact to a page"),
    ("events", True, "learn when the VMM frees or moves guest memory"),
    ("pagemap_scan", True, "read which pages were touched"),
    ("minor_shmem", False, "rwp: no first touch of a page in the file is missed"),
    ("poison", False, "poison a page whose stored copy is damaged, instead of ending the VM's access with a signal"),
    ("move", False, "private guest memory, later"),
    ("rwp", False, "the tracker rwp, and freezing by it"),
    ("idle_page_tracking", False, "the tracker idle"),
    ("damon_vaddr", False, "the tracker damon"),
    ("ptrace_seccomp_filter", False, "see what a sandboxed VMM's filter forbids before attaching"),
)

# Features that are tried, and where it is said what came of it.
_LACKS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "wp_shmem": "wp_lacks",
        "pagemap_scan": "pagemap_scan_lacks",
        "rwp": "rwp_lacks",
        "idle_page_tracking": "idle_lacks",
        "damon_vaddr": "damon_lacks",
    }
)

_FREEZE_WHY: Final[Mapping[Freeze, str]] = MappingProxyType(
    {
        Freeze.RWP: "goes with rwp: any touch of a page that is copied out cancels its eviction, and nobody waits long",
        Freeze.WP: "write-protection also covers pages that are in the file but not mapped, so no first write is lost",
        Freeze.NONE: "this kernel cannot write-protect shmem through userfaultfd",
    }
)


def features(kernel: KernelFeatures) -> tuple[Feature, ...]:
    """The kernel's features as a table."""
    return tuple(
        Feature(name, bool(getattr(kernel, name)), needed, why, getattr(kernel, _LACKS.get(name, ""), ""))
        for name, needed, why in _FEATURES
    )


def tracker_findings(
    probes: Iterable[TrackerProbe], wanted: tuple[Tracker, ...], chosen: Tracker
) -> tuple[TrackerFinding, ...]:
    """A line for each tracker that there is, in the pager's order."""
    return tuple(
        TrackerFinding(
            name=probe.tracker.word,
            possible=probe.possible,
            wanted=not wanted or probe.tracker in wanted,
            chosen=probe.tracker is chosen,
            detail=probe.detail,
        )
        for probe in probes
    )


def in_use(status: Status, next_one: Tracker, why_next: str, *, by_agent: bool) -> str:
    """What to say of a VM whose pager has taken a tracker, when a new one would take ``next_one``.

    ``by_agent``: as the running agent wants it, so that its next pager does.
    """
    said = [f"{status.tracker.word} is in use" if status.tracker else "no tracker works now: ages stand still"]
    if status.tracker_switches:
        said.append(f"others failed {status.tracker_switches} times before")
    if next_one is status.tracker:
        said.append(why_next)
    elif next_one is Tracker.NONE:
        said.append(f"for a new pager {why_next}")
    else:
        starts = "`frostline-agent release` starts one" if by_agent else "an agent with this list would start one"
        said.append(f"a new pager would take {next_one.word}: {why_next}; {starts}")
    return "; ".join(said)


def kept_for(status: Status | None) -> Freeze:
    """How memory is registered and will be by the next pager too; NONE: as that one likes."""
    stays = status is not None and (status.evicted_pages or status.poisoned_pages or status.state is State.CORRUPT)
    return status.freeze if status is not None and stays else Freeze.NONE


def but_for(refusal: str) -> str:
    """How what holds of a refused VM begins: its trackers' details, and why none is used."""
    return f"this VM is refused: {refusal}; else "


def why_here(wanted: tuple[Tracker, ...], host: Iterable[TrackerProbe], here: Iterable[TrackerProbe]) -> str:
    """Why the next pager at one VM takes what ``preferred`` says, and why not what it would take at any other."""
    host, here = tuple(host), tuple(here)
    said = why_preferred(wanted, here)
    rather, chosen = preferred(wanted, host), preferred(wanted, here)
    if rather not in (Tracker.NONE, chosen):
        lacks = "".join(f": {probe.detail}" for probe in here if probe.tracker is rather)
        said += f"; {rather.word} {'goes before it and ' if chosen else ''}is possible on this host"
        said += f", but not at this VM now{lacks}"
    return said


def probe(wanted: Wanted) -> Probe:
    """Look at the kernel and at every VMM. Touches neither; reads all of /proc."""
    kernel = probe_kernel()
    table = features(kernel)
    opens = kernel.userfaultfd_device or kernel.userfaultfd_syscall
    able = opens and all(feature.there for feature in table if feature.needed)
    mglru = Mglru()
    vmms = Discovery().sweep()
    probes = probe_trackers()
    chosen = preferred(wanted.trackers, probes)
    freeze = freeze_for(chosen) if kernel.wp_shmem or chosen is Tracker.RWP else Freeze.NONE
    return Probe(
        able=able,
        kernel_release=os.uname().release,
        features=table,
        trackers_wanted=trackers_text(wanted.trackers),
        trackers_from=wanted.source,
        trackers=tracker_findings(probes, wanted.trackers, chosen),
        tracker=chosen.word if chosen else "",
        tracker_why=why_preferred(wanted.trackers, probes),
        freeze_method=freeze.word,
        freeze_why=_FREEZE_WHY[freeze],
        mglru=f"mglru {mglru.why_not() or 'tells an estimate of what is cold in their cgroups'}",
        vmms=tuple(_with_estimates([_finding(vmm, wanted, probes) for vmm in vmms], mglru)),
    )


def _finding(vmm: Vmm, wanted: Wanted, host: tuple[TrackerProbe, ...]) -> VmmFinding:
    pid = vmm.process.pid
    interval_ms = round(wanted.scan_interval_seconds * 1000)
    try:
        found = inspect(pid)
        probes = probe_trackers(pid, found.memory_bytes or vmm.memory_bytes, interval_ms)
    except NativeError as error:
        return VmmFinding(pid, vmm.name, vmm.uuid, vmm.executable, 0, False, 0, 0, "internal", str(error))
    served = found.refusal is Refusal.ALREADY_SERVED or found.served_by_pid > 0
    finding = VmmFinding(
        pid=pid,
        name=vmm.name,
        uuid=vmm.uuid,
        executable=vmm.executable,
        served_by_pid=found.served_by_pid,
        has_vault=found.has_vault,
        memory_bytes=found.memory_bytes or vmm.memory_bytes,
        regions=len(found.regions),
        refusal="" if served or not found.refusal else found.refusal.word,
        sentence=found.detail or ("served now" if served else "can be served"),
    )
    status = _status(pid) if found.has_vault else None
    chosen, why = preferred(wanted.trackers, probes), why_here(wanted.trackers, host, probes)
    if status is not None and served:
        return replace(
            finding,
            tracker=status.tracker.word if status.tracker else "",
            tracker_in_use=True,
            tracker_why=in_use(status, chosen, why, by_agent=wanted.by_agent),
            freeze_method=status.freeze.word,
            trackers=tracker_findings(probes, wanted.trackers, status.tracker),
        )
    if finding.refusal:
        otherwise = but_for(finding.refusal)
        refused = [replace(each, possible=False, detail=f"{otherwise}{each.detail}") for each in probes]
        word = chosen.word if chosen else "none"
        return replace(
            finding,
            tracker_why=f"{otherwise}{word} would be used, {why}",
            trackers=tracker_findings(refused, wanted.trackers, Tracker.NONE),
        )
    return replace(
        finding,
        tracker=chosen.word if chosen else "",
        tracker_why=why,
        freeze_method=(kept_for(status) or freeze_for(chosen)).word,
        trackers=tracker_findings(probes, wanted.trackers, chosen),
    )


def _with_estimates(findings: list[VmmFinding], mglru: Mglru) -> Iterator[VmmFinding]:
    """What looks cold of those that nobody is attached to."""
    answers = mglru.estimates([finding.pid for finding in findings if not finding.has_vault])
    for finding in findings:
        answer = answers.get(finding.pid)
        if isinstance(answer, ColdEstimate):
            within = answer.within(finding.memory_bytes) if finding.memory_bytes else answer
            yield replace(finding, cold_estimate=within.document())
        else:
            yield replace(finding, no_estimate_why=answer or "")


def _status(pid: int) -> Status | None:
    """As its pager says in the vault; None when that cannot be read (any more)."""
    try:
        with View(pid) as view:
            return view.status()
    except NativeError:
        return None
