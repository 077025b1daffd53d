# SPDX-License-Identifier: Apache-2.0
"""One VM on a screen: where its memory is, what it may have away and why, how faults go, and its histograms."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from frostline.controller.cli.document import saved_bytes
from frostline.controller.cli.histogram import EVICTED_STYLE, RESIDENT_STYLE, draw, stacked_bar
from frostline.controller.cli.screen import Screen
from frostline.controller.cli.tables import ago, budgets_differ, name_of, nanoseconds, why
from frostline.controller.cli.words import (
    REASON_SENTENCES,
    clean,
    freeze_method_word,
    mode_word,
    pager_word,
    reason_word,
    refusal_word,
    style_of,
    tracker_word,
)
from frostline.v1 import common_pb2, operator_pb2
from frostline.wire.units import format_duration, format_size

# What a picture that is redrawn in place has room for on 24 lines.
_BRIEF: Final = ("memory", "saved", "budget", "why", "refused", "cold", "not accepted", "faults", "damage")


def vm_view(vm: operator_pb2.Vm, screen: Screen, *, brief: bool = False) -> RenderableType:
    """The VM as lines; `brief` leaves out what does not change and cuts lines instead of wrapping them."""
    chosen = [(label, value) for label, value in _facts(vm, screen) if not brief or label in _BRIEF]
    facts = Table.grid(padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True, min_width=max(len(label) for label, _value in chosen))
    facts.add_column(no_wrap=brief, overflow="crop" if brief else "fold")
    for label, value in chosen:
        facts.add_row(label, value)
    parts: list[RenderableType] = [_title(vm, screen), Text(""), _memory_bar(vm, screen), facts]
    if vm.state.HasField("histogram"):
        heading = Text("Guest memory by how long it has been idle, and promotions by the age then", style="bold")
        parts += [Text(""), heading, *draw(vm.state.histogram, min(screen.width, 120), screen.glyphs)]
    return Group(*parts)


def _title(vm: operator_pb2.Vm, screen: Screen) -> Text:
    dot = f" {screen.glyphs.bullet} "
    title = Text.assemble((name_of(vm), "bold"), f"  on {clean(vm.node_id)}")
    mode, pager = mode_word(vm.decision.mode), pager_word(vm.state.pager_state) or "not attached"
    class_words = f"class {clean(vm.decision.policy_class)}" if vm.decision.policy_class else ""
    for word, style in ((mode, style_of(mode)), (class_words, ""), (pager, style_of(pager))):
        if word:
            title.append(dot)
            title.append(word, style=style)
    return title


def _memory_bar(vm: operator_pb2.Vm, screen: Screen) -> Text:
    state, glyphs = vm.state, screen.glyphs
    width = min(100, screen.width)
    memory = state.memory_bytes or vm.identity.memory_bytes
    untouched = _untouched(state, memory)
    if not memory:
        return Text("")
    return stacked_bar(
        [
            (state.resident_bytes, glyphs.resident, RESIDENT_STYLE),
            (state.evicted_bytes, glyphs.evicted, EVICTED_STYLE),
            (untouched, glyphs.empty, "dim"),
        ],
        memory,
        width,
    )


def _untouched(state: common_pb2.VmState, memory_bytes: int) -> int:
    return max(0, memory_bytes - state.resident_bytes - state.swapped_bytes - state.evicted_bytes)


def _facts(vm: operator_pb2.Vm, screen: Screen) -> Iterator[tuple[str, Text]]:
    identity, state = vm.identity, vm.state
    memory = state.memory_bytes or identity.memory_bytes
    untouched = _untouched(state, memory)
    yield (
        "memory",
        Text.assemble(
            f"{format_size(memory)}: ",
            (f"{screen.glyphs.resident} ", RESIDENT_STYLE),
            f"{format_size(state.resident_bytes)} in RAM, ",
            (f"{screen.glyphs.evicted} ", EVICTED_STYLE),
            f"{format_size(state.evicted_bytes)} away, ",
            (f"{screen.glyphs.empty} ", "dim"),
            f"{format_size(untouched)} untouched",
        ),
    )
    if state.swapped_bytes:
        yield "swapped", Text(f"{format_size(state.swapped_bytes)} that the host kernel itself has swapped out")
    yield "saved", Text(_saved(state))
    yield "working set", Text(f"{format_size(state.working_set_bytes)} touched in the last 120 s")
    yield "budget", _budget(vm)
    yield "why", _why(vm)
    if state.refusal:
        detail = f": {clean(state.refusal_detail)}" if state.refusal_detail else ""
        yield "refused", Text(f"{refusal_word(state.refusal)}{detail}", style="bold red")
    if state.cold_estimate_bytes:
        yield "cold", Text(_estimate(state))
    if vm.HasField("ack") and not vm.ack.accepted:
        detail = f": {clean(vm.ack.detail)}" if vm.ack.detail else ""
        yield "not accepted", Text(f"{reason_word(vm.ack.reason) or 'no reason given'}{detail}", style="yellow")
    yield "away as", Text(_tiers(state))
    yield "faults", Text(_faults(state))
    yield "pager", Text(_pager(state))
    if state.pager_state:
        yield "tracker", _tracker(state)
    errors = _errors(state.counters)
    if errors:
        yield "damage", Text(errors, style="bold red")
    yield "report", Text(f"{ago(vm.report_age_seconds)} ago")
    where = f", UUID {clean(identity.uuid)}" if identity.uuid and identity.uuid != identity.vm_id else ""
    yield "id", Text(f"{clean(identity.vm_id)}{where}, VMM pid {identity.pid}")


def _saved(state: common_pb2.VmState) -> str:
    if not state.evicted_bytes:
        return f"nothing: nothing is away, and metadata takes {format_size(state.metadata_bytes)}"
    return (
        f"{format_size(saved_bytes(state))} of host RAM: what is away, less {format_size(state.pool_bytes)} of pool "
        f"and {format_size(state.metadata_bytes)} of metadata"
    )


def _budget(vm: operator_pb2.Vm) -> Text:
    state, decision = vm.state, vm.decision
    if decision.mode == common_pb2.MODE_PLAN:
        return Text(f"plan: {format_size(decision.planned_bytes)} could be away; none is sent in this mode")
    text = Text(f"desired {format_size(decision.budget_bytes)} (version {decision.version}), ")
    text.append(
        f"in force {format_size(state.effective_budget_bytes)} (version {state.effective_version})",
        style="yellow" if budgets_differ(vm) else "",
    )
    if state.lease_remaining_seconds > 0:
        text.append(f", lease {ago(state.lease_remaining_seconds)} left")
    elif state.effective_budget_bytes:
        text.append(", lease run out", style="bold red")
    return text


def _why(vm: operator_pb2.Vm) -> Text:
    word = why(vm)
    reason = reason_word(vm.decision.reason)
    sentence = clean(vm.decision.sentence) or REASON_SENTENCES.get(reason, "")
    return Text.assemble((word, style_of(word)), f": {sentence}" if sentence else "")


def _tiers(state: common_pb2.VmState) -> str:
    if not state.evicted_bytes:
        return "nothing is away"
    parts = []
    if state.evicted_zero_bytes:
        parts.append(f"{format_size(state.evicted_zero_bytes)} zero")
    if state.evicted_same_bytes:
        parts.append(f"{format_size(state.evicted_same_bytes)} same-filled")
    if state.evicted_ram_bytes:
        ratio = f", {state.evicted_ram_bytes / state.stored_bytes:.1f}:1" if state.stored_bytes else ""
        parts.append(f"{format_size(state.evicted_ram_bytes)} compressed to {format_size(state.stored_bytes)}{ratio}")
    return ", ".join(parts) or format_size(state.evicted_bytes)


def _faults(state: common_pb2.VmState) -> str:
    counters = state.counters
    if not counters.faults:
        return "none served yet"
    return (
        f"{counters.faults:,} served, p50 {nanoseconds(state.fault_p50_ns)}, p99 {nanoseconds(state.fault_p99_ns)}; "
        f"vCPUs waited {nanoseconds(counters.stall_ns)} in all"
    )


def _pager(state: common_pb2.VmState) -> str:
    word = pager_word(state.pager_state)
    if not word:
        return "none"
    # 1000 is no brake at all; 0 is also what an agent says that has no pager yet.
    braked = 0 < state.brake_permille < 1000 or state.holding_back == common_pb2.REASON_BRAKE
    brake = f", the brake leaves {state.brake_permille / 10:g} % of the budget" if braked else ""
    took_over = f", taken over {state.counters.takeovers} times" if state.counters.takeovers else ""
    every = f" every {format_duration(state.scan_interval_seconds)}" if state.scan_interval_seconds > 0 else ""
    return (
        f"{word}, pid {state.pager_pid}, attached {ago(state.attached_seconds)}, "
        f"{state.counters.scans:,} scans{every}, {state.counters.evictions:,} evictions{brake}{took_over}"
    )


def _tracker(state: common_pb2.VmState) -> Text:
    """How accesses are seen, and what that has cost."""
    counters = state.counters
    word, freeze = tracker_word(state.tracker), freeze_method_word(state.freeze_method)
    text = Text(word) if word else Text("none works now: ages stand still", style="yellow")
    if state.tracker_grain_pages > 1:
        text.append(f", an estimate: one page in {state.tracker_grain_pages:,} speaks for all", style="yellow")
    if freeze:
        text.append(f", freezes by {freeze}")
    if counters.scans and (counters.arm_ns or counters.harvest_ns):
        text.append(f"; a scan takes {nanoseconds((counters.arm_ns + counters.harvest_ns) // counters.scans)}")
    if counters.tracker_switches:
        text.append(f"; others failed {counters.tracker_switches:,} times before", style="yellow")
    return text


def _estimate(state: common_pb2.VmState) -> str:
    """What looks cold to the kernel, with all that makes it an estimate."""
    sizes = [format_size(size) for size in state.cold_estimate_bytes]
    ages = [format_duration(age, parts=2) for age in state.cold_estimate_min_age_seconds]
    older = "".join(f", ~{size} for {age}" for size, age in zip(sizes[1:], ages[1:], strict=False))
    others = state.cold_estimate_sharers
    shared = f" and that of {others:,} other process{'es' if others > 1 else ''}" if others else ""
    return (
        f"~{sizes[0]} cold (estimate): not seen touched for {''.join(ages[:1])}{older}, when the kernel looked "
        f"{ago(state.cold_estimate_looked_seconds)} ago; of its whole cgroup, the VMM's own memory{shared} included"
    )


def _errors(counters: common_pb2.Counters) -> str:
    found = [
        f"{count:,} {what}"
        for count, what in (
            (counters.checksum_errors, "checksum errors"),
            (counters.poisoned_pages, "poisoned pages"),
            (counters.scan_failures, "failed scans"),
        )
        if count
    ]
    return ", ".join(found)
