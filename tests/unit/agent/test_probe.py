# SPDX-License-Identifier: Apache-2.0
"""What `probe` says of trackers, on hosts and of VMs that this machine does not have."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import pytest
from rich.console import Console

from frostline.agent import probe as probing
from frostline.agent.cli.output import print_probe
from frostline.agent.discovery import Vmm
from frostline.agent.mglru import ColdEstimate
from frostline.agent.probe import Probe, VmmFinding, in_use, kept_for, probe
from frostline.agent.procfs import ProcessId
from frostline.agent.trackers import KNOWN
from frostline.agent.wanted import Wanted
from frostline.native import (
    Freeze,
    Inspection,
    KernelFeatures,
    NativeError,
    Refusal,
    State,
    Status,
    Tracker,
    TrackerProbe,
    probe_kernel,
)
from tests.unit.agent.doubles import GIB, a_status

SERVED, FREE, REFUSED, BROKEN = 11, 12, 13, 14


@dataclass
class World:
    """A host: what its kernel allows for any VM and for single ones, and what is found at them."""

    possible: set[Tracker] = field(default_factory=lambda: {Tracker.RWP, Tracker.ZAP})
    impossible_at: dict[int, Tracker] = field(default_factory=dict)
    no_mglru: str = ""
    asked: dict[int, tuple[int, int]] = field(default_factory=dict)  # memory and scan interval, by pid
    status: Status = field(default_factory=lambda: a_status(tracker=Tracker.RWP, freeze=Freeze.RWP))

    def probe_trackers(
        self, pid: int = 0, memory_bytes: int = 0, scan_interval_ms: int = 0
    ) -> tuple[TrackerProbe, ...]:
        self.asked[pid] = (memory_bytes, scan_interval_ms)
        gone = self.impossible_at.get(pid)
        return tuple(
            TrackerProbe(
                tracker,
                tracker in self.possible and tracker is not gone,
                f"{tracker.word} at {'this one' if tracker is gone else 'any'}",
            )
            for tracker in KNOWN
        )

    def inspect(self, pid: int) -> Inspection:
        if pid == BROKEN:
            raise NativeError(5, "cannot inspect process 14: Input/output error")
        refusal = {SERVED: Refusal.ALREADY_SERVED, REFUSED: Refusal.LOCKED}.get(pid, Refusal.NONE)
        served_by = 99 if pid == SERVED else 0
        return Inspection(refusal, (), GIB, 1, 0, 0, served_by, pid == SERVED, "it is locked" if pid == REFUSED else "")

    def why_not(self) -> str:
        return self.no_mglru

    def estimates(self, pids: Sequence[int]) -> dict[int, ColdEstimate | str]:
        known: dict[int, ColdEstimate | str] = {FREE: "no swap", BROKEN: "no swap"}
        return {pid: known.get(pid) or ColdEstimate((9 * GIB, 1 << 20, 0, 0), 5.0, 1) for pid in pids}

    def look(
        self, wanted: tuple[Tracker, ...] = (), seconds: float = 0.0, *, by_agent: bool = True
    ) -> tuple[Probe, dict[int, VmmFinding]]:
        found = probe(Wanted(wanted, seconds, by_agent=by_agent))
        return found, {vmm.pid: vmm for vmm in found.vmms}


def kernel(**lacks: str) -> KernelFeatures:
    """A kernel that has everything, but for what has a sentence in ``lacks``: ``rwp="..."``."""
    values: dict[str, Any] = {
        name: "" if name.endswith("_lacks") else True for name in KernelFeatures.__dataclass_fields__
    }
    for name, sentence in lacks.items():
        field_name = {"wp": "wp_shmem", "idle": "idle_page_tracking", "damon": "damon_vaddr"}.get(name, name)
        values |= {field_name: False, f"{name}_lacks": sentence}
    return KernelFeatures(**values | {"raw_features": 0})


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()

    class FakeView:
        def __init__(self, pid: int) -> None:
            if pid != SERVED:
                raise NativeError(2, "no vault")

        def __enter__(self) -> Self:
            return self

        def __exit__(
            self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
        ) -> None:
            return

        def status(self) -> Status:
            return world.status

    class FakeDiscovery:
        def sweep(self) -> list[Vmm]:
            return [Vmm(ProcessId(pid, 1), f"vm-{pid}", "", "/usr/bin/qemu") for pid in (SERVED, FREE, REFUSED, BROKEN)]

    monkeypatch.setattr(probing, "probe_kernel", lambda: kernel())
    monkeypatch.setattr(probing, "probe_trackers", world.probe_trackers)
    monkeypatch.setattr(probing, "inspect", world.inspect)
    monkeypatch.setattr(probing, "View", FakeView)
    monkeypatch.setattr(probing, "Discovery", FakeDiscovery)
    monkeypatch.setattr(probing, "Mglru", lambda: world)
    return world


def printed(found: Probe, width: int) -> str:
    """What people read, on a terminal of so many columns."""
    text = io.StringIO()
    print_probe(found, Console(file=text, width=width))
    return text.getvalue()


def test_the_host_says_what_is_possible_chosen_and_why(world: World) -> None:
    found, _ = world.look()
    assert [(each.name, each.possible, each.chosen) for each in found.trackers] == [
        ("rwp", True, True),
        ("zap", True, False),
        ("idle", False, False),
        ("damon", False, False),
    ]
    assert found.tracker_why == "the first of rwp,zap,idle,damon that is possible here"
    assert (found.tracker, found.freeze_method, found.trackers_wanted) == ("rwp", "rwp", "auto")
    assert found.trackers_from == "the built-in default"
    forced, _ = world.look((Tracker.DAMON, Tracker.ZAP))
    assert (forced.tracker, forced.freeze_method, forced.trackers_wanted) == ("zap", "wp", "damon,zap")
    assert [each.wanted for each in forced.trackers] == [False, True, False, True]
    other, _ = world.look((Tracker.IDLE,))
    assert other.tracker == "" and "none of idle is possible here" in other.tracker_why
    assert "rwp, zap would be: put it in the list" in other.tracker_why
    world.possible.clear()
    none, _ = world.look((Tracker.IDLE,))
    assert none.tracker == "" and "nor any other" in none.tracker_why


def test_a_feature_that_is_there_by_half_says_which_half_is_missing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = kernel(wp="UFFDIO_WRITEPROTECT does not keep writes from a page", rwp="UFFDIO_RWPROTECT fails: [EINVAL]")
    monkeypatch.setattr(probing, "probe_kernel", lambda: half)
    found, _ = world.look()
    assert not found.able, "what is needed works by half, and that is not enough"
    lacking = {feature.name: feature.lacks for feature in found.features if not feature.there}
    assert lacking == {"wp_shmem": half.wp_lacks, "rwp": half.rwp_lacks}
    assert all(feature.lacks == "" for feature in found.features if feature.there)
    assert "makes zap exact to a page - UFFDIO_WRITEPROTECT does not keep writes from a page" in printed(found, 300)


def test_a_vm_that_is_served_says_what_is_in_use_and_one_that_is_not_what_would_be(world: World) -> None:
    world.impossible_at[FREE] = Tracker.RWP
    _, vmms = world.look()
    served, free = vmms[SERVED], vmms[FREE]
    assert (served.tracker, served.tracker_in_use, served.freeze_method) == ("rwp", True, "rwp")
    assert served.tracker_why == "rwp is in use; the first of rwp,zap,idle,damon that is possible here"
    assert (free.tracker, free.tracker_in_use, free.freeze_method) == ("zap", False, "wp")
    assert [each.name for each in free.trackers if each.chosen] == ["zap"]
    assert len(served.trackers) == len(free.trackers) == len(KNOWN)


def test_a_refused_and_an_unreadable_vm_use_none(world: World) -> None:
    world.impossible_at[REFUSED] = Tracker.DAMON
    found, vmms = world.look()
    text = printed(found, 300)
    refused, broken = vmms[REFUSED], vmms[BROKEN]
    assert (refused.refusal, refused.tracker, refused.freeze_method) == ("locked", "", "")
    assert not any(each.chosen or each.possible for each in refused.trackers)
    # What each would give is told all the same.
    assert refused.tracker_why.startswith("this VM is refused: locked; else "), refused.tracker_why
    assert len({each.detail for each in refused.trackers}) == len(refused.trackers)
    assert all(each.detail.startswith("this VM is refused: locked; else ") for each in refused.trackers)
    otherwise = "rwp (see above); zap (see above); idle (see above); damon (damon at this one)"
    assert text.count(f"  if it were not refused: {otherwise}\n") == 1, text
    assert broken.refusal == "internal" and "Input/output error" in broken.sentence and not broken.trackers


def test_what_looks_cold_is_estimated_of_those_that_nobody_is_attached_to(world: World) -> None:
    found, vmms = world.look()
    assert found.mglru == "mglru tells an estimate of what is cold in their cgroups"
    assert vmms[SERVED].cold_estimate is None and vmms[SERVED].no_estimate_why == ""
    estimate = vmms[REFUSED].cold_estimate
    assert estimate is not None and estimate["ages"][0]["cold_bytes"] == GIB, "no more than the VM has"
    assert vmms[FREE].no_estimate_why == "no swap"
    text = " ".join(printed(found, 100).split())
    assert "~1.00 GiB cold (estimate): not seen touched for 2m, ~1.00 MiB for 10m" in text
    assert "shared with 1 other process;" in text and "no estimate of its cold memory: no swap" in text
    world.no_mglru = "needs a kernel with CONFIG_LRU_GEN"
    assert probe(Wanted()).mglru == "mglru needs a kernel with CONFIG_LRU_GEN"


def test_another_choice_says_how_to_get_it() -> None:
    zap = a_status(tracker=Tracker.ZAP, freeze=Freeze.WP)
    assert in_use(zap, Tracker.RWP, "the first of all", by_agent=True).endswith("`frostline-agent release` starts one")
    # As somebody asks what if, or as an agent would that does not run.
    said = in_use(zap, Tracker.RWP, "the first of all", by_agent=False)
    assert "release" not in said and said.endswith("an agent with this list would start one")
    switched = a_status(tracker=Tracker.NONE, freeze=Freeze.WP, tracker_switches=3)
    said = in_use(switched, Tracker.NONE, "none of damon is possible here", by_agent=True)
    assert "no tracker works now" in said and "failed 3 times" in said and "none of damon" in said


def test_a_vm_says_what_keeps_it_from_what_this_host_would_rather_use(world: World) -> None:
    world.impossible_at = {SERVED: Tracker.RWP, FREE: Tracker.RWP}
    world.status = a_status(tracker=Tracker.ZAP, freeze=Freeze.WP, evicted_pages=7)
    found, vmms = world.look()
    lacking = "rwp goes before it and is possible on this host, but not at this VM now: rwp at this one"
    first = "the first of rwp,zap,idle,damon that is possible here"
    assert vmms[SERVED].tracker_why == f"zap is in use; {first}; {lacking}"
    assert vmms[FREE].tracker_why == f"{first}; {lacking}"
    text = printed(found, 300)
    assert text.count("rwp at this one") == 2, "said once for each VM"
    others = "rwp (as just said); idle (see above); damon (see above)"
    assert text.count(f"  not possible: {others}\n") == 2
    assert f"  tracker: zap is in use; {first}" in text and f"  tracker: zap would be used, {first}" in text
    world.possible.add(Tracker.DAMON)
    world.impossible_at.clear()
    found, _ = world.look()
    text = printed(found, 300)
    assert f"zap is in use; a new pager would take rwp: {first}; `frostline-agent release` starts one" in text
    assert "could be used: rwp (see above); damon (see above)" in text


def test_a_list_of_which_nothing_fits_a_vm_is_kept_to_there(world: World) -> None:
    world.possible = {Tracker.RWP, Tracker.ZAP, Tracker.DAMON}
    world.impossible_at = {SERVED: Tracker.ZAP, FREE: Tracker.ZAP}
    world.status = a_status(tracker=Tracker.RWP, freeze=Freeze.RWP, evicted_pages=7)
    _, vmms = world.look((Tracker.ZAP,))
    assert vmms[SERVED].tracker_why == (
        "rwp is in use; for a new pager none of zap is possible here, so nothing would be evicted; "
        "rwp, damon would be: put it in the list; zap is possible on this host, but not at this VM now: zap at this one"
    )
    assert vmms[FREE].tracker == ""


def test_registration_stays_while_anything_is_away_or_lost() -> None:
    for kept in ({"evicted_pages": 1}, {"poisoned_pages": 1}, {"state": State.CORRUPT}):
        assert kept_for(a_status(freeze=Freeze.RWP, **kept)) is Freeze.RWP
    assert kept_for(a_status(freeze=Freeze.RWP)) is kept_for(None) is Freeze.NONE


def test_trackers_are_asked_about_with_the_size_of_each_vm_and_the_interval_to_come(world: World) -> None:
    world.look(seconds=2.5)
    assert world.asked == {0: (0, 0), **dict.fromkeys((SERVED, FREE, REFUSED), (GIB, 2500))}


def test_people_read_it_on_a_narrow_terminal_and_programs_as_json(world: World) -> None:
    world.impossible_at[FREE] = Tracker.RWP
    found, _ = world.look()
    text = printed(found, 80)
    assert "tracker: rwp (the first of rwp,zap,idle,damon that is possible here)" in " ".join(text.split())
    assert "rwp, in use" in text and "vm-13: it is locked" in text
    assert "but not at this VM now: rwp at" in " ".join(text.split())
    assert json.loads(json.dumps(found.document()))["vmms"][0]["trackers"][0]["name"] == "rwp"


def test_this_machine_can_be_probed() -> None:
    found = probe(Wanted())
    assert {each.name for each in found.trackers} <= {tracker.word for tracker in KNOWN}
    assert all(each.detail for each in found.trackers) and len(found.trackers) >= 2
    assert (found.tracker == "") == (not any(each.possible for each in found.trackers))
    assert {feature.name: feature.there for feature in found.features}["pagemap_scan"] is probe_kernel().pagemap_scan
