# SPDX-License-Identifier: Apache-2.0
"""Tables for people. Colour says nothing that a word does not say too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from frostline.agent.probe import Probe, VmmFinding, but_for
from frostline.wire.units import format_duration, format_size


def print_probe(probe: Probe, console: Console) -> None:
    """The kernel's features, the choice that follows, and each VMM."""
    table = Table(title=f"Kernel {probe.kernel_release}", title_justify="left")
    for column in ("feature", "there", "needed", "what for"):
        table.add_column(column)
    for feature in probe.features:
        there = "[green]yes[/]" if feature.there else ("[red]no[/]" if feature.needed else "[dim]no[/]")
        # What only a tracker needs, the table of trackers tells.
        lacks = f" - {escape(feature.lacks)}" if feature.lacks and feature.needed else ""
        table.add_row(feature.name, there, "yes" if feature.needed else "", f"{feature.purpose}{lacks}")
    console.print(table)
    table = Table(title=f"Trackers (wanted: {probe.trackers_wanted})", title_justify="left")
    for column in ("tracker", "possible", "chosen", "what it gives, or what is missing"):
        table.add_column(column)
    for tracker in probe.trackers:
        chosen = "[green]chosen[/]" if tracker.chosen else ("" if tracker.wanted else "not wanted")
        table.add_row(tracker.name, "yes" if tracker.possible else "no", chosen, escape(tracker.detail))
    console.print(table)
    console.print(f"wanted: {probe.trackers_wanted}, from {escape(probe.trackers_from)}")
    console.print(f"tracker: [bold]{probe.tracker or 'none'}[/] ({probe.tracker_why})")
    console.print(f"summary for VMs that nobody is attached to: {escape(probe.mglru)}")
    console.print(f"freeze method: [bold]{probe.freeze_method}[/] ({probe.freeze_why})")
    if not probe.vmms:
        console.print("No QEMU process was found.")
        return
    table = Table(title="VMMs", title_justify="left")
    for column in ("name", "pid", "memory", "regions", "served", "tracker", "freeze"):
        table.add_column(column, justify="right" if column in ("pid", "memory", "regions") else "left")
    for vmm in probe.vmms:
        if vmm.served_by_pid:
            served = f"[green]by pager {vmm.served_by_pid}[/]"
        elif vmm.refusal:
            served = f"[red]refused: {vmm.refusal}[/]"
        else:
            served = "possible"
        memory = format_size(vmm.memory_bytes) if vmm.memory_bytes else "-"
        used = f"{vmm.tracker or 'none'}, in use" if vmm.tracker_in_use else vmm.tracker or "-"
        name, freeze = escape(vmm.name), vmm.freeze_method or "-"
        table.add_row(name, str(vmm.pid), memory, str(vmm.regions), served, used, freeze)
    console.print(table)
    of_host = {(tracker.name, tracker.possible, tracker.detail) for tracker in probe.trackers}
    for vmm in probe.vmms:
        console.print(f"{escape(vmm.name)}: {escape(vmm.sentence)}")
        if vmm.tracker_why:
            would = "" if vmm.tracker_in_use or vmm.refusal else f"{vmm.tracker or 'none'} would be used, "
            console.print(f"  tracker: {would}{escape(vmm.tracker_why)}")
            for line in _other_choices(vmm, of_host):
                console.print(f"  {escape(line)}")
        if vmm.cold_estimate:
            console.print(f"  {estimate_text(vmm.cold_estimate)}")
        elif vmm.no_estimate_why and vmm.no_estimate_why != probe.mglru:
            console.print(f"  no estimate of its cold memory: {escape(vmm.no_estimate_why)}")


def _other_choices(vmm: VmmFinding, of_host: set[tuple[str, bool, str]]) -> Iterator[str]:
    """What each tracker that is not chosen would give, or why it is not possible; what was said is referred to."""
    if vmm.refusal:
        known = {(name, detail) for name, _, detail in of_host}
        details = [(each.name, each.detail.removeprefix(but_for(vmm.refusal))) for each in vmm.trackers]
        said = [f"{name} ({'see above' if (name, detail) in known else detail})" for name, detail in details]
        yield f"if it were not refused: {'; '.join(said)}"
        return
    for possible, words in ((True, "could be used"), (False, "not possible")):
        said = []
        for tracker in vmm.trackers:
            if tracker.chosen or tracker.possible is not possible:
                continue
            if (tracker.name, possible, tracker.detail) in of_host:
                said.append(f"{tracker.name} (see above)")
            elif not possible and tracker.detail in vmm.tracker_why:
                said.append(f"{tracker.name} (as just said)")
            else:
                said.append(f"{tracker.name} ({tracker.detail})")
        if said:
            yield f"{words}: {'; '.join(said)}"


def _tracker(pager: dict[str, Any]) -> str:
    word: str = pager.get("tracker", "-")
    return f"{word} (estimate)" if pager.get("tracker_grain_pages", 1) > 1 else word


def print_status(status: dict[str, Any], console: Console) -> None:
    """The agent in a line, its VMs in a table, and a sentence for each that is not served."""
    agent = status["agent"]
    if agent["mode"] == "standalone":
        link = "standalone, by its own policy file"
    elif agent["connected"]:
        link = f"session with {agent['controller_id']} for {_ago(agent['session_seconds'])}"
    else:
        link = (
            f"[red]no session[/] for {_ago(agent['session_seconds'])}: {escape(agent['last_error'] or 'not yet tried')}"
        )
    evict = "allowed" if agent["allow_evict"] else "[yellow]not allowed by this host[/]"
    console.print(f"[bold]{escape(agent['node_id'])}[/]: {link}; eviction {evict}; epoch {agent['highest_epoch']}")
    table = Table()
    for column in (
        "VM",
        "pid",
        "phase",
        "mode",
        "memory",
        "resident",
        "away",
        "may be away",
        "lease",
        "pool",
        "faults",
        "tracker",
    ):
        numeric = column not in ("VM", "phase", "mode", "tracker")
        table.add_column(column, justify="right" if numeric else "left")
    for vm in status["vms"]:
        pager, grant = vm["pager"] or {}, vm["grant"] or {}
        table.add_row(
            escape(vm["name"]),
            str(vm["pid"]),
            _phase(vm),
            grant.get("mode", "-"),
            format_size(vm["memory_bytes"]),
            _size(pager, "resident_bytes"),
            _size(pager, "evicted_bytes"),
            _size(pager, "budget_bytes"),
            _ago(pager["lease_seconds"]) if pager else "-",
            _size(pager, "pool_bytes"),
            str(pager.get("faults", "-")),
            _tracker(pager),
        )
    console.print(table)
    for vm in status["vms"]:
        if vm["cold_estimate"]:
            console.print(f"{escape(vm['name'])}: {estimate_text(vm['cold_estimate'])}")
        if vm["refusal"]:
            console.print(f"{escape(vm['name'])} is not served ({vm['refusal']}): {escape(vm['refusal_detail'])}")
        elif vm["grant"]:
            console.print(f"{escape(vm['name'])}: {vm['grant']['reason']}, {escape(vm['grant']['why'])}")


def estimate_text(estimate: dict[str, Any]) -> str:
    """``ColdEstimate.document`` in words."""
    first, *rest = estimate["ages"]
    older = "".join(f", ~{format_size(each['cold_bytes'])} for {_ago(each['min_age_seconds'])}" for each in rest)
    sharers = estimate["sharers"]
    shared = f"; shared with {sharers} other process{'es' if sharers > 1 else ''}" if sharers else ""
    return (
        f"~{format_size(first['cold_bytes'])} cold (estimate): not seen touched for {_ago(first['min_age_seconds'])}"
        f"{older}; the kernel looked {_ago(estimate['looked_seconds'])} ago{shared}; {estimate['caveats']}"
    )


def _phase(vm: dict[str, Any]) -> str:
    phase = str(vm["phase"])
    if vm["held"]:
        phase += f" ({vm['held']} by hand)"
    colour = {"served": "green", "refused": "red", "foreign": "yellow"}.get(vm["phase"], "default")
    return f"[{colour}]{phase}[/]"


def _size(pager: dict[str, Any], key: str) -> str:
    return format_size(pager[key]) if pager else "-"


def _ago(seconds: float | None) -> str:
    return format_duration(round(seconds or 0.0), parts=2)
