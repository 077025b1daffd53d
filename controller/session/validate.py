# SPDX-License-Identifier: Apache-2.0
"""What an agent may say. Agents are not trusted: one of them may be broken or hostile, and it must harm only itself."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable

from frostline.v1 import common_pb2 as pb
from frostline.v1 import session_pb2 as wire

PROTOCOL_VERSION = 1
MAX_VMS = 4096
MAX_BINS = 256
MAX_MEMORY_BYTES = 1 << 50
MAX_AGE_SECONDS = 10 * 365 * 86400.0
MAX_TEXT = 256
MAX_DETAIL = 512
MAX_ENUM = 255
MAX_ESTIMATES = 16
MAX_PROCESSES = 1 << 22  # as pids go
# Epochs count controller starts, versions budget sets: numbers beyond these are made up, and following them
# would leave no room to count on.
MAX_EPOCH = 1 << 32
MAX_VERSION = 1 << 53

_NODE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_VM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@/-]{0,255}", re.ASCII)


class InvalidError(Exception):
    """A message that is refused; `problems` holds (field, what is wrong with it)."""

    def __init__(self, problems: Iterable[tuple[str, str]]) -> None:
        self.problems = list(problems)[:64]
        super().__init__("; ".join(f"{field}: {why}" for field, why in self.problems[:8]))


def check_hello(hello: wire.Hello, known_epoch: int) -> None:
    """InvalidError with everything that is wrong. `known_epoch` is ours: no agent has seen more than a few above it."""
    problems = []
    if _NODE_ID.fullmatch(hello.node_id) is None:
        problems.append(
            (
                "hello.node_id",
                f"{_cut(hello.node_id)!r} is no node id; use up to 128 letters, digits, '.', '_', ':', '-'",
            )
        )
    if hello.protocol_version != PROTOCOL_VERSION:
        problems.append(
            ("hello.protocol_version", f"{hello.protocol_version} is not spoken here; this controller speaks 1")
        )
    if len(hello.agent_instance) != 16:
        problems.append(("hello.agent_instance", f"{len(hello.agent_instance)} bytes; a UUIDv7 has 16"))
    for field in ("boot_id", "agent_version"):
        if not _is_text(getattr(hello, field)):
            problems.append((f"hello.{field}", f"longer than {MAX_TEXT} characters, or not printable"))
    if len(hello.capabilities) > 256 or not all(map(_is_text, hello.capabilities)):
        problems.append(("hello.capabilities", f"more than 256, or one is not printable or over {MAX_TEXT} characters"))
    if hello.highest_epoch > max(MAX_EPOCH, known_epoch):
        problems.append(("hello.highest_epoch", f"{hello.highest_epoch} was never given out; clear the agent's state"))
    if hello.applied_version > MAX_VERSION:
        problems.append(("hello.applied_version", f"{hello.applied_version} was never given out"))
    problems += check_host_memory("hello", hello.host_memory_bytes, hello.host_available_bytes)
    problems += check_identities("hello.vms", hello.vms)
    if problems:
        raise InvalidError(problems)


def check_report(report: wire.Report) -> None:
    """InvalidError when the report as a whole cannot be used. Single bad VM states are for `state_problem`."""
    problems = check_identities("report.vms", report.vms)
    problems += _check_unique("report.states", [state.vm_id for state in report.states])
    problems += _check_unique("report.gone_vm_ids", report.gone_vm_ids)
    both = set(report.gone_vm_ids) & {state.vm_id for state in report.states}
    if both:
        problems.append(("report.gone_vm_ids", f"{_cut(sorted(both)[0])!r} is said to be gone and to have a state"))
    problems += check_host_memory("report", report.host_memory_bytes, report.host_available_bytes)
    if problems:
        raise InvalidError(problems)


def check_host_memory(where: str, total_bytes: int, available_bytes: int) -> list[tuple[str, str]]:
    if total_bytes > MAX_MEMORY_BYTES or available_bytes > max(total_bytes, 0):
        return [(f"{where}.host_memory_bytes", f"{available_bytes} of {total_bytes} bytes available cannot be")]
    return []


def check_identities(where: str, identities: Iterable[pb.VmIdentity]) -> list[tuple[str, str]]:
    """Everything wrong with a list of VM identities."""
    identities = list(identities)
    problems = _check_unique(where, [identity.vm_id for identity in identities])
    if problems and len(identities) > MAX_VMS:
        return problems
    # 0 bytes: a VM that could not be looked into. Names come from the VMM's command line and are not the agent's
    # fault; they are made harmless by `clean_identity` instead of costing the whole host its session.
    for index, identity in enumerate(identities):
        if identity.memory_bytes > MAX_MEMORY_BYTES:
            problems.append((f"{where}[{index}].memory_bytes", f"{identity.memory_bytes} is no VM's memory"))
    return problems[:32]


def clean_identity(identity: pb.VmIdentity) -> pb.VmIdentity:
    """The identity with names that fit logs, terminals and metrics."""
    cleaned = pb.VmIdentity()
    cleaned.CopyFrom(identity)
    for field in ("name", "uuid", "vm_class"):
        setattr(cleaned, field, clean_detail(getattr(identity, field))[:MAX_TEXT])
    return cleaned


def _check_unique(where: str, ids: Iterable[str]) -> list[tuple[str, str]]:
    ids = list(ids)
    if len(ids) > MAX_VMS:
        return [(where, f"{len(ids)} VMs; a host may have {MAX_VMS}")]
    problems, seen = [], set()
    for vm_id in ids:
        if _VM_ID.fullmatch(vm_id) is None:
            problems.append((where, f"{_cut(vm_id)!r} is no VM id"))
        elif vm_id in seen:
            problems.append((where, f"{vm_id!r} is in it twice"))
        seen.add(vm_id)
    return problems[:32]


def state_problem(state: pb.VmState, identity: pb.VmIdentity) -> str:
    """Why a VM's state cannot be believed, or an empty string. What is refused leaves the last good state in place."""
    memory_bytes = state.memory_bytes or identity.memory_bytes
    if memory_bytes > MAX_MEMORY_BYTES:
        return f"memory_bytes {memory_bytes} is no VM's memory"
    for field in ("resident_bytes", "evicted_bytes", "working_set_bytes", "swapped_bytes"):
        if getattr(state, field) > memory_bytes:
            return f"{field} {getattr(state, field)} is more than its memory, {memory_bytes}"
    for field in ("pool_bytes", "stored_bytes", "metadata_bytes"):
        # The pool may waste some, but never multiples of what it can hold.
        if getattr(state, field) > 2 * memory_bytes + (1 << 26):
            return f"{field} {getattr(state, field)} is out of proportion to its memory, {memory_bytes}"
    for field in ("lease_remaining_seconds", "scan_interval_seconds", "attached_seconds"):
        value = getattr(state, field)
        if not 0.0 <= value <= MAX_AGE_SECONDS:
            return f"{field} {value} is no duration"
    for field in ("tracker", "freeze_method"):
        # Numbers that are not known here may be a newer agent's.
        if not 0 <= getattr(state, field) <= MAX_ENUM:
            return f"{field} {getattr(state, field)} is no number of one"
    if state.brake_permille > 1000:
        return f"brake_permille {state.brake_permille} is above 1000"
    if len(state.refusal_detail) > MAX_DETAIL:
        return f"refusal_detail has {len(state.refusal_detail)} characters; {MAX_DETAIL} are allowed"
    return _estimate_problem(state, memory_bytes) or _histogram_problem(state.histogram, memory_bytes)


def _estimate_problem(state: pb.VmState, memory_bytes: int) -> str:
    ages, sizes = list(state.cold_estimate_min_age_seconds), list(state.cold_estimate_bytes)
    if len(ages) != len(sizes) or len(ages) > MAX_ESTIMATES:
        return f"cold_estimate has {len(ages)} ages and {len(sizes)} sizes; {MAX_ESTIMATES} of each are allowed"
    if ages and (state.pager_state or state.attached_seconds or state.HasField("histogram")):
        return "cold_estimate of a VM that somebody is attached to"
    if any(not math.isfinite(age) or not 0.0 <= age <= MAX_AGE_SECONDS for age in ages):
        return "cold_estimate has an age that is no duration"
    if any(later <= earlier for earlier, later in itertools.pairwise(ages)):
        return "cold_estimate's ages do not grow"
    if any(older > younger for younger, older in itertools.pairwise(sizes)):
        return "cold_estimate has more that is older than there is in all"
    if sizes and sizes[0] > memory_bytes:
        return f"cold_estimate_bytes {sizes[0]} is more than its memory, {memory_bytes}"
    if not 0.0 <= state.cold_estimate_looked_seconds <= MAX_AGE_SECONDS:
        return f"cold_estimate_looked_seconds {state.cold_estimate_looked_seconds} is no duration"
    if state.cold_estimate_sharers > MAX_PROCESSES:
        return f"cold_estimate_sharers {state.cold_estimate_sharers} is no number of processes"
    return ""


def _histogram_problem(histogram: pb.Histogram, memory_bytes: int) -> str:
    ages, rates = histogram.min_age_seconds, histogram.promotions_per_minute
    lengths = [len(ages), len(histogram.resident_bytes), len(histogram.evicted_bytes), len(rates)]
    if len(set(lengths)) != 1:
        return f"histogram columns have different lengths {lengths}"
    if lengths[0] > MAX_BINS:
        return f"histogram has {lengths[0]} bins; {MAX_BINS} are allowed"
    if any(not math.isfinite(age) or not 0.0 <= age <= MAX_AGE_SECONDS for age in ages):
        return "histogram has an age that is no duration"
    if any(ages) and any(later <= earlier for earlier, later in itertools.pairwise(ages)):
        return "histogram ages do not grow from bin to bin"
    if any(not math.isfinite(rate) or rate < 0.0 for rate in rates):
        return "histogram has a promotion rate that is no rate"
    for field in ("resident_bytes", "evicted_bytes"):
        total = sum(getattr(histogram, field))
        if total > memory_bytes:
            return f"histogram {field} add up to {total}, more than its memory, {memory_bytes}"
    return ""


def clean_detail(text: str) -> str:
    """A peer's words, fit for logs and terminals."""
    return _cut("".join(char if char.isprintable() else " " for char in text[: MAX_DETAIL * 2]), MAX_DETAIL)


def _is_text(text: str) -> bool:
    return len(text) <= MAX_TEXT and text.isprintable()


def _cut(text: str, limit: int = 64) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
