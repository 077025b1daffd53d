# SPDX-License-Identifier: Apache-2.0
"""Tables of hosts, VMs and policy versions that fit the terminal: where it is narrow, the least needed columns go."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Generic, Literal, TypeVar

from rich.table import Table
from rich.text import Text

from frostline.controller.cli.document import saved_bytes
from frostline.controller.cli.screen import Screen
from frostline.controller.cli.words import clean, host_word, mode_word, reason_word, refusal_word, style_of
from frostline.v1 import common_pb2, operator_pb2
from frostline.wire.units import format_duration, format_size

Row = TypeVar("Row")
_GAP: Final = 2
# A name longer than this gives way to the columns that people came for.
_NAME_MIN: Final = 12


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column: `keep` says how long it stays when the terminal narrows (0 goes first, 9 never goes)."""

    head: str
    cell: Callable[[Row], Text | str]
    keep: int
    align: Literal["left", "right"] = "left"
    shrinks: Literal["", "middle", "end"] = ""  # where it is cut when there is too little room


def fit(columns: Sequence[Column[Row]], rows: Sequence[Row], screen: Screen) -> Table:
    """A table no wider than the screen: first names are cut in the middle, then the least needed columns go, and
    only then are words cut at their end."""
    cells = [[_as_text(column.cell(row)) for column in columns] for row in rows]
    natural = [
        max([len(column.head), *(line[index].cell_len for line in cells)]) for index, column in enumerate(columns)
    ]
    least = [min(w, _NAME_MIN) if c.shrinks == "middle" else w for c, w in zip(columns, natural, strict=True)]
    kept = list(range(len(columns)))

    def room(widths: list[int]) -> int:
        return screen.width - sum(widths[i] for i in kept) - _GAP * (len(kept) - 1)

    while room(least) < 0 and any(columns[i].keep < 9 for i in kept):
        kept.remove(min(kept, key=lambda i: (columns[i].keep, -i)))
    for i in kept:
        if columns[i].shrinks == "end" and room(least) < 0:
            least[i] = max(len(columns[i].head), least[i] + room(least))
    widths = list(least)
    spare = max(0, room(least))
    for i in kept:
        grow = min(spare, natural[i] - least[i])
        widths[i] += grow
        spare -= grow
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold", expand=False)
    for i in kept:
        table.add_column(columns[i].head, justify=columns[i].align, no_wrap=True, width=widths[i], overflow="crop")
    for line in cells:
        table.add_row(*(_cut(line[i], widths[i], columns[i].shrinks, screen.glyphs.ellipsis) for i in kept))
    return table


def _cut(text: Text, width: int, where: str, ellipsis: str) -> Text:
    """Names are cut in the middle: they tell themselves apart by their ends."""
    if text.cell_len <= width:
        return text
    tail = (width - 1) // 2 if where == "middle" else 0
    head = width - 1 - tail
    return Text(text.plain[:head] + ellipsis + (text.plain[-tail:] if tail else ""), style=text.style)


def hosts_table(hosts: Iterable[operator_pb2.Host], screen: Screen) -> Table:
    columns: list[Column[operator_pb2.Host]] = [
        Column("HOST", lambda h: clean(h.node_id), 9, shrinks="middle"),
        Column("STATE", lambda h: _word_text(host_state(h)), 9),
        Column("SEEN", lambda h: f"{ago(h.last_seen_seconds)} ago", 4, "right"),
        Column("VMS", lambda h: f"{h.vm_count}", 9, "right"),
        Column("HOST RAM", lambda h: _size(h.host_memory_bytes), 2, "right"),
        Column("AVAILABLE", lambda h: _size(h.host_available_bytes), 3, "right"),
        Column("VM MEMORY", lambda h: _size(h.memory_bytes), 5, "right"),
        Column("IN RAM", lambda h: _size(h.resident_bytes), 6, "right"),
        Column("AWAY", lambda h: _size(h.evicted_bytes), 9, "right"),
        Column("POOL", lambda h: _size(h.pool_bytes), 3, "right"),
        Column("SAVED", lambda h: _size(h.saved_bytes), 9, "right"),
        Column("BUDGETS", _versions, 4, "right"),
        Column("AGENT", lambda h: clean(h.agent_version) or "-", 0),
    ]
    return fit(columns, sorted(hosts, key=lambda h: h.node_id), screen)


def vms_table(vms: Iterable[operator_pb2.Vm], screen: Screen) -> Table:
    columns: list[Column[operator_pb2.Vm]] = [
        Column("VM", name_of, 9, shrinks="middle"),
        Column("HOST", lambda v: clean(v.node_id), 5, shrinks="middle"),
        Column("CLASS", lambda v: clean(v.decision.policy_class) or "-", 1),
        Column("MODE", lambda v: _word_text(mode_word(v.decision.mode) or "-"), 6),
        Column("MEMORY", lambda v: _size(v.state.memory_bytes or v.identity.memory_bytes), 4, "right"),
        Column("IN RAM", lambda v: _size(v.state.resident_bytes), 7, "right"),
        Column("AWAY", lambda v: _size(v.state.evicted_bytes), 9, "right"),
        Column("SAVED", lambda v: _size(saved_bytes(v.state)), 8, "right"),
        Column("BUDGET", _desired, 9, "right"),
        Column("IN FORCE", lambda v: _in_force(v), 9, "right"),
        Column("FAULT P99", lambda v: nanoseconds(v.state.fault_p99_ns), 2, "right"),
        Column("WHY", lambda v: _word_text(why(v)), 9, shrinks="end"),
    ]
    vms = list(vms)
    if any(vm.state.cold_estimate_bytes for vm in vms):
        columns.insert(-1, Column("COLD (ESTIMATE)", _estimate, 3, "right"))
    return fit(columns, sorted(vms, key=lambda v: (v.node_id, v.identity.name, v.identity.vm_id)), screen)


def policies_table(policies: Iterable[operator_pb2.Policy], screen: Screen) -> Table:
    columns: list[Column[operator_pb2.Policy]] = [
        Column("VERSION", lambda p: f"{p.version}", 9, "right"),
        Column("IN FORCE", lambda p: _word_text("yes", "green") if p.in_force else "", 9),
        Column("PUT", lambda p: when(p.created_at_unix_ns), 9),
        Column("BY", lambda p: clean(p.author) or "-", 5, shrinks="middle"),
        Column("COMMENT", lambda p: clean(p.comment) or "-", 9, shrinks="end"),
    ]
    return fit(columns, list(policies), screen)


def name_of(vm: operator_pb2.Vm) -> str:
    return clean(vm.identity.name or vm.identity.vm_id or vm.state.vm_id)


def host_state(host: operator_pb2.Host) -> str:
    word = host_word(host.state) or "-"
    return f"{word}: frozen" if host.frozen else word


def why(vm: operator_pb2.Vm) -> str:
    """The one word (with its detail where there is one) for why this VM has what it has."""
    if vm.state.refusal:
        return f"unsafe: {refusal_word(vm.state.refusal)}"
    if vm.HasField("ack") and not vm.ack.accepted and vm.ack.reason:
        return f"nack: {reason_word(vm.ack.reason)}"
    reason = reason_word(vm.decision.reason)
    if reason == "mode":
        return f"mode: {mode_word(vm.decision.mode) or '-'}"
    holding = vm.state.holding_back
    # What holds the pager back right now matters only where the decision itself would let it go on.
    if reason in ("granted", "floor", "cap") and holding not in (0, common_pb2.REASON_GRANTED):
        return f"{reason}, {reason_word(holding)}" if reason != reason_word(holding) else reason
    return reason or "-"


def when(unix_ns: int) -> str:
    if not unix_ns:
        return "-"
    return datetime.fromtimestamp(unix_ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


def ago(seconds: float) -> str:
    return format_duration(max(0.0, round(seconds) if seconds >= 1 else 0.0), parts=2)


def nanoseconds(value_ns: int) -> str:
    """A latency for people; `-` for none."""
    if value_ns == 0:
        return "-"
    for unit, factor in (("s", 10**9), ("ms", 10**6), ("us", 10**3)):
        if value_ns >= factor:
            value = value_ns / factor
            return f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"
    return f"{value_ns} ns"


def _desired(vm: operator_pb2.Vm) -> str:
    decision = vm.decision
    if decision.mode == common_pb2.MODE_PLAN and decision.planned_bytes:
        return f"plan {format_size(decision.planned_bytes)}"
    return _size(decision.budget_bytes)


def _estimate(vm: operator_pb2.Vm) -> str:
    """Only of a VM that nobody is attached to."""
    sizes = vm.state.cold_estimate_bytes
    return f"~{_size(sizes[0])}" if sizes else "-"


def budgets_differ(vm: operator_pb2.Vm) -> bool:
    """Whether what is in force is worth a look beside what is desired: a set is under way, or the host allows less.
    Small steps of a decision are not sent at once, and nobody needs to hear of those."""
    desired, effective = vm.decision.budget_bytes, vm.state.effective_budget_bytes
    return abs(desired - effective) * 32 > max(desired, effective)


def _in_force(vm: operator_pb2.Vm) -> Text:
    return Text(_size(vm.state.effective_budget_bytes), style="yellow" if budgets_differ(vm) else "")


def _versions(host: operator_pb2.Host) -> Text:
    if not host.budget_version_desired:
        return Text("-")
    if host.budget_version_applied == host.budget_version_desired:
        return Text(f"{host.budget_version_desired}")
    return Text(f"{host.budget_version_applied} of {host.budget_version_desired}", style="yellow")


def _size(size_bytes: int) -> str:
    return format_size(size_bytes) if size_bytes else "0"


def _word_text(word: str, style: str | None = None) -> Text:
    return Text(clean(word), style=style if style is not None else style_of(word.partition(", ")[2] or word))


def _as_text(cell: Text | str) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)
