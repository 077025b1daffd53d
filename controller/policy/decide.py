# SPDX-License-Identifier: Apache-2.0
"""The decision itself: `decide(policy, vm, flags)`, pure. Plan mode and enforcement differ in one line of it."""

from __future__ import annotations

import math
from dataclasses import replace

from frostline.controller.policy.document import BUILT_IN, Policy, PolicyMode, Rule
from frostline.controller.policy.snapshot import Decision, Flags, VmSnapshot
from frostline.v1 import common_pb2 as pb
from frostline.wire.units import format_duration, format_size

# Ages of a VM seen for the first time are guesses until every page had the chance to be seen touched.
WARMUP_SCANS = 3
# A VM whose report is older than this many report intervals keeps what it has, and gets no more.
STALE_REPORTS = 3
# Ages are whole scans, and scans are never exactly as long as planned.
AGE_TOLERANCE = 0.99


def decide(policy: Policy, vm: VmSnapshot, flags: Flags) -> Decision:
    """What `vm` may have away under `policy`. Never raises for any snapshot, never grants more than is cold.

    Reasons in order of precedence: excluded, mode OFF or OBSERVE, unsafe, corrupt, draining, no usable report or too
    few scans, frozen, stale; then whichever of cold set, cap and floor is the tightest.
    """
    rule, class_name, excluded, note = _rule_for(policy, vm)
    cold_bytes = cold(vm, rule.min_idle_age_seconds)
    base = Decision(
        mode=rule.mode,
        budget_bytes=0,
        planned_bytes=0,
        cold_bytes=cold_bytes,
        min_age_seconds=rule.min_idle_age_seconds,
        rate_bytes_per_second=rule.rate_bytes_per_second,
        reason=pb.REASON_UNSPECIFIED,
        policy_class=class_name,
        sentence="",
        rule=rule,
    )
    if excluded:
        sentence = f"{vm.label} is excluded by policy: Frostline leaves it alone."
        return replace(base, mode=PolicyMode.OFF, reason=pb.REASON_EXCLUDED, sentence=sentence)
    if rule.mode <= PolicyMode.OBSERVE:
        word = "is off: not attached" if rule.mode is PolicyMode.OFF else "is only observed: nothing is evicted"
        return replace(base, reason=pb.REASON_MODE, sentence=f"{vm.label} {word} (class {class_name}).{note}")
    allowed, reason, sentence = _allowed(vm, flags, rule, cold_bytes)
    if rule.mode is PolicyMode.PLAN:
        planned = f"Plan only: nothing is evicted. With enforce, {_uncapitalized(sentence, vm.label)}{note}"
        return replace(base, planned_bytes=allowed, reason=pb.REASON_MODE, sentence=planned)
    return replace(base, budget_bytes=allowed, planned_bytes=allowed, reason=reason, sentence=sentence + note)


def cold(vm: VmSnapshot, min_idle_age_seconds: float) -> int:
    """Bytes idle for at least that age, with everything that is away already.

    A bin that only partly is that old counts as warm. The histogram is of the last scan and `evicted_bytes` of now:
    what left in between is in both, so only the histogram's two columns are added up.
    """
    enough = min_idle_age_seconds * AGE_TOLERANCE
    resident = sum(each.resident_bytes for each in vm.bins if each.min_age_seconds >= enough)
    away_then = sum(each.evicted_bytes for each in vm.bins)
    came_back = max(away_then - vm.evicted_bytes, 0)
    return min(max(resident + away_then - came_back, vm.evicted_bytes), vm.memory_bytes)


def filled(vm: VmSnapshot) -> int:
    """Bytes that the guest ever wrote to and did not give back; the smaller of the two counts, as in `cold`."""
    total = vm.resident_bytes + vm.evicted_bytes
    by_age = sum(each.resident_bytes + each.evicted_bytes for each in vm.bins)
    return min(total, by_age or total, vm.memory_bytes)


def _rule_for(policy: Policy, vm: VmSnapshot) -> tuple[Rule, str, bool, str]:
    """Rule, class, whether excluded, and a sentence more for explain where something was not as asked."""
    vm_rules = policy.vm_rules(vm.vm_id, vm.uuid, vm.name)
    asked = next((rule.vm_class for rule in vm_rules if rule.vm_class), None) or vm.vm_class
    class_name = asked or policy.document.default_class
    rule, note = policy.class_rule(class_name), ""
    if rule is None:
        # Somebody wanted something for this VM that nobody wrote down: evicting from it would be a guess.
        class_name = policy.document.default_class
        rule = policy.class_rule(class_name) or BUILT_IN["standard"]
        rule = replace(rule, mode=min(rule.mode, PolicyMode.PLAN))
        note = f" The host asks for class {asked!r}, which the policy does not have: {class_name} is planned, no more."
    for vm_rule in reversed(vm_rules):
        rule = rule.under(vm_rule)
    return rule, class_name, any(each.exclude for each in vm_rules), note


def _allowed(vm: VmSnapshot, flags: Flags, rule: Rule, cold_bytes: int) -> tuple[int, int, str]:
    """Bytes that may be away if the rule is enforced, the reason, and a sentence."""
    label, away = vm.label, min(vm.evicted_bytes, vm.memory_bytes)
    if vm.refusal:
        return 0, pb.REASON_UNSAFE, f"{label} cannot be tiered safely: {vm.refusal}."
    if vm.corrupt:
        sentence = f"{label} had a checksum error: nothing more is evicted from it, {_size(away)} stays away."
        return away, pb.REASON_CORRUPT, sentence
    if flags.draining and away > 0:
        return 0, pb.REASON_DRAINING, f"{label} is being drained: {_size(away)} is still away and comes back."
    if vm.report_age_seconds is None:
        why = f"its reports are unusable ({vm.problem})" if vm.problem else "its agent has not reported it yet"
        return 0, pb.REASON_STALE if vm.problem else pb.REASON_WARMUP, f"{label} gets nothing: {why}."
    limit, reason, sentence = _tightest(vm, rule, cold_bytes)
    if flags.frozen:
        # Pages that came back since do not go again, and nobody is made to fault everything in by a freeze.
        sentence = f"{label}: the {flags.frozen} is frozen, nothing new is evicted ({_size(away)} away)."
        return away, pb.REASON_FROZEN, sentence
    if vm.scans < WARMUP_SCANS:
        sentence = f"{label} warms up: {vm.scans} of {WARMUP_SCANS} scans done, ages are not known yet."
        return min(away, limit), pb.REASON_WARMUP, sentence
    if vm.problem or vm.report_age_seconds > STALE_REPORTS * flags.report_seconds:
        age = format_duration(round(vm.report_age_seconds, 1))
        why = f" and the newer ones are unusable ({vm.problem})" if vm.problem else ""
        held = min(flags.last_budget_bytes, limit)
        return held, pb.REASON_STALE, f"{label}: the last good report is {age} old{why}; {_size(held)} is not raised."
    return limit, reason, sentence


def _tightest(vm: VmSnapshot, rule: Rule, cold_bytes: int) -> tuple[int, int, str]:
    label, idle = vm.label, format_duration(rule.min_idle_age_seconds)
    # The floor counts what the guest ever filled: memory that it never touched keeps nothing in RAM.
    floor_bytes, cap_bytes = rule.floor.of(vm.memory_bytes), rule.cap.of(vm.memory_bytes)
    above_floor = max(filled(vm) - floor_bytes, 0)
    limit = min(cold_bytes, cap_bytes, above_floor)
    cold_words = f"{_size(cold_bytes)} of {label} is idle for {idle}"
    if cold_bytes == 0:
        return 0, pb.REASON_NOTHING_COLD, f"no page of {label} has been idle for {idle}{_beyond(vm, rule)}."
    if limit == cold_bytes:
        return limit, pb.REASON_GRANTED, f"{label} may have all of its cold memory away: {cold_words}."
    if limit == above_floor:
        kept = f"the floor of {_amount(str(rule.floor), floor_bytes)} stays in RAM"
        return limit, pb.REASON_FLOOR, f"{label} may have {_size(limit)} away: {cold_words}, but {kept}."
    most = f"the cap lets no more than {_amount(str(rule.cap), cap_bytes)} go"
    return limit, pb.REASON_CAP, f"{label} may have {_size(limit)} away: {cold_words}, but {most}."


def _beyond(vm: VmSnapshot, rule: Rule) -> str:
    """Ages end with the last bin: a VM whose scans are too frequent for the rule would wait for ever, silently."""
    oldest = max((each.min_age_seconds for each in vm.bins), default=math.inf)
    if rule.min_idle_age_seconds * AGE_TOLERANCE <= oldest:
        return ""
    return f", and ages are told up to {format_duration(oldest)} only: lower min_idle_age or scan less often"


def _amount(written: str, size_bytes: int) -> str:
    return f"{written} ({_size(size_bytes)})" if written.endswith("%") else written


def _size(size_bytes: int) -> str:
    return format_size(max(size_bytes, 0))


def _uncapitalized(sentence: str, label: str) -> str:
    """The sentence as the second half of another one; a VM's name keeps its letters."""
    return sentence if sentence.startswith(label) else sentence[:1].lower() + sentence[1:]
