# SPDX-License-Identifier: Apache-2.0
"""Applies budget sets to the VMs, whoever they come from, within what the host's own limits leave."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Final

import structlog
from opentelemetry.trace import Span

from frostline.agent.budgets import Grant, Judgement, VmFacts, judge
from frostline.agent.host import Host
from frostline.agent.limits import Limits
from frostline.agent.state import StateError, StateFile
from frostline.agent.traces import Traces
from frostline.agent.vm import Phase, Vm
from frostline.v1 import common_pb2, session_pb2
from frostline.wire.telemetry import traceparent_of
from frostline.wire.units import format_rate, format_size

# The host-wide pool limit binds at its value and lets go a tenth below, so that it does not flap.
POOL_RELEASE: Final = 0.9
# A budget that moves by less than this share of the VM's memory is no news for people.
QUIET_STEP: Final = 0.02

Reason = common_pb2.Reason
_log: Final = structlog.stdlib.get_logger("frostline.agent.budget")

_ABSENT: Final = Grant(
    common_pb2.MODE_OBSERVE, True, 0, 0, 0.0, Reason.REASON_LEASE, "the newest budget set does not name it"
)


class Authority:
    """The one place that decides what a VM may have away."""

    def __init__(
        self, host: Host, limits: Limits, state: StateFile, traces: Traces, *, attach_grace_seconds: float
    ) -> None:
        self._host: Final = host
        self.limits = limits
        self._state: Final = state
        self._traces: Final = traces
        self._grace_seconds: Final = attach_grace_seconds
        self._last_set: session_pb2.BudgetSet | None = None
        self._last_lease_until_ns = 0
        self._stream_version = 0
        self._pool_full = False
        self._lock: Final = asyncio.Lock()

    @property
    def highest_epoch(self) -> int:
        return self._state.state.highest_epoch

    @property
    def applied_version(self) -> int:
        return self._state.state.applied_version

    @property
    def pool_full(self) -> bool:
        """Whether the host-wide pool limit holds eviction back now."""
        return self._pool_full

    def forget_stream(self) -> None:
        """A new stream: versions are compared only within one. What was taken before holds for its lease."""
        self._stream_version = 0

    async def welcome(self, epoch: int) -> str:
        """The controller's epoch on connecting; gives back why it is refused, empty when it is not."""
        # 0: it has none yet and will send no budgets until it has.
        if 0 < epoch < self.highest_epoch:
            return f"its epoch {epoch} is below {self.highest_epoch}, the highest seen"
        if epoch > self.highest_epoch:
            await self._remember(highest_epoch=epoch)
        return ""

    async def take(self, budget_set: session_pb2.BudgetSet) -> session_pb2.BudgetResult:
        """Judge a set, apply it, and answer it."""
        async with self._lock:
            with self._traces.applying(budget_set) as span:
                result = await self._take(budget_set, span)
                result.traceparent = traceparent_of(span)
                return result

    async def reapply(self, limits: Limits) -> None:
        """The local limits changed: judge the last set anew, with what is left of its lease."""
        async with self._lock:
            self.limits = limits
            await self._apply_again()
            self.settle()

    def settle(self) -> None:
        """Say for each VM whether it should be attached to. Cheap: called every cycle."""
        for vm in self._host:
            names = vm.facts.names
            vm.vm_class = self.limits.vm_class(names)
            forbidden = self.limits.denied(names)
            vm.want(not forbidden and self._should_attach(vm), forbidden)

    async def watch_pool(self) -> None:
        """Hold every VM at what it has away while the pools together are at the host's limit."""
        limit = self.limits.document.pool_max
        total = sum(vm.status.pool_bytes for vm in self._host if vm.status)
        full = limit is not None and total >= limit * (POOL_RELEASE if self._pool_full else 1.0)
        if full == self._pool_full:
            return
        self._pool_full = full
        _log.warning(
            "the pools are at the host's limit; nothing more is evicted" if full else "the pools have room again",
            pool_bytes=total,
            limit_bytes=limit,
        )
        async with self._lock:
            await self._apply_again()

    def _should_attach(self, vm: Vm) -> bool:
        if vm.grant is not None:
            return vm.grant.attach
        if vm.vm_id in self._state.state.off_vm_ids:
            return False
        waited = time.monotonic() - vm.discovered_at >= self._grace_seconds
        # What an earlier agent attached to stays attached while nobody says otherwise.
        served = vm.status is not None or vm.phase is Phase.SERVED
        return served or (waited and self.limits.document.observe_unasked)

    async def _take(self, budget_set: session_pb2.BudgetSet, span: Span) -> session_pb2.BudgetResult:
        last_version = 0
        if self._last_set is not None and self._last_set.epoch == budget_set.epoch:
            last_version = self._stream_version
        judgement = self._judge(budget_set, self.highest_epoch, last_version, time.time_ns())
        if judgement.applied:
            try:
                await self._remember(
                    highest_epoch=max(budget_set.epoch, self.highest_epoch),
                    applied_version=budget_set.version,
                    off_vm_ids=self._off_after(judgement),
                )
            except StateError as error:
                judgement = Judgement(False, Reason.REASON_EPOCH, f"the fence cannot be kept: {error}", 0.0, {}, {})
        result = session_pb2.BudgetResult(
            nonce=budget_set.nonce,
            version=budget_set.version,
            epoch=self.highest_epoch,
            applied=judgement.applied,
            reason=judgement.reason,
            detail=judgement.detail,
        )
        span.set_attribute("frostline.applied", judgement.applied)
        if not judgement.applied:
            _log.warning(
                "refused a budget set",
                reason=_word(judgement.reason),
                why=judgement.detail,
                version=budget_set.version,
                epoch=budget_set.epoch,
            )
            return result
        lease_until_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + int(judgement.lease_seconds * 1e9)
        self._last_set, self._last_lease_until_ns = budget_set, lease_until_ns
        self._stream_version = budget_set.version
        self._traces.applied(budget_set.version, span)
        problems = await self._apply(budget_set, judgement, lease_until_ns)
        for vm_id, vm_result in judgement.results.items():
            if vm_id in problems and vm_result.accepted:
                vm_result = session_pb2.VmBudgetResult(
                    vm_id=vm_id, accepted=False, reason=Reason.REASON_PAGER, detail=problems[vm_id]
                )
            result.vms.append(vm_result)
        return result

    async def _apply_again(self) -> None:
        """What was taken is only judged by what has changed here: neither a higher epoch nor its age undoes it."""
        if self._last_set is not None:
            last = self._last_set
            judgement = self._judge(last, last.epoch, 0, last.issued_at_unix_ns)
            await self._apply(last, judgement, self._last_lease_until_ns)

    def _judge(
        self, budget_set: session_pb2.BudgetSet, highest_epoch: int, last_version: int, now_unix_ns: int
    ) -> Judgement:
        facts: dict[str, VmFacts] = {vm.vm_id: vm.facts for vm in self._host}
        return judge(
            budget_set,
            facts,
            self.limits,
            highest_epoch=highest_epoch,
            last_version=last_version,
            now_unix_ns=now_unix_ns,
        )

    def _off_after(self, judgement: Judgement) -> frozenset[str]:
        named = set(judgement.grants)
        off = {vm_id for vm_id, grant in judgement.grants.items() if grant.mode == common_pb2.MODE_OFF}
        return frozenset((self._state.state.off_vm_ids - named) | off)

    async def _apply(
        self, budget_set: session_pb2.BudgetSet, judgement: Judgement, lease_until_ns: int
    ) -> Mapping[str, str]:
        """Give each VM its grant; gives back what pagers did not take, by VM id."""
        vms = list(self._host)
        for vm in vms:
            grant = judgement.grants.get(vm.vm_id)
            if grant is None:
                off = vm.vm_id in self._state.state.off_vm_ids
                grant = replace(_ABSENT, attach=not off)
            grant = self._within_pool(vm, grant)
            _say(vm, grant, budget_set.version)
            named = vm.vm_id in judgement.grants and grant.reason != Reason.REASON_INVALID
            vm.set_grant(grant, budget_set.version, lease_until_ns if named else 0)
        self.settle()
        problems = await asyncio.gather(*(vm.apply() for vm in vms))
        found = {vm.vm_id: problem for vm, problem in zip(vms, problems, strict=True) if problem}
        for vm_id, problem in found.items():
            _log.warning("a pager did not take its budget", vm_id=vm_id, why=problem)
        return found

    def _within_pool(self, vm: Vm, grant: Grant) -> Grant:
        if not self._pool_full or grant.bytes <= vm.evicted_bytes:
            return grant
        sentence = f"pool_max in {self.limits.source} is reached"
        return replace(grant, bytes=vm.evicted_bytes, reason=Reason.REASON_LIMITED_LOCALLY, sentence=sentence)

    async def _remember(self, **changes: object) -> None:
        await asyncio.to_thread(self._state.update, **changes)


def _say(vm: Vm, grant: Grant, version: int) -> None:
    """One line for each change; the renewal of a lease is none, and small steps are for debugging."""
    if grant == vm.grant:
        return
    log = _log.debug if vm.grant is not None and _small_step(vm.grant, grant, vm.memory_bytes) else _log.info
    log(
        "budget",
        vm=vm.vmm.name,
        vm_id=vm.vm_id,
        mode=common_pb2.Mode.Name(grant.mode).removeprefix("MODE_").lower(),
        may_be_away=format_size(grant.bytes),
        was=format_size(vm.grant.bytes) if vm.grant else "nothing",
        min_age_seconds=grant.min_age_seconds,
        rate=format_rate(grant.rate_bytes_per_second),
        reason=_word(grant.reason),
        why=grant.sentence,
        version=version,
    )


def _small_step(old: Grant, new: Grant, memory_bytes: int) -> bool:
    same = replace(new, bytes=old.bytes, sentence=old.sentence) == old
    return same and (old.bytes == 0) == (new.bytes == 0) and abs(new.bytes - old.bytes) < QUIET_STEP * memory_bytes


def _word(reason: common_pb2.Reason.ValueType) -> str:
    try:
        return common_pb2.Reason.Name(reason).removeprefix("REASON_").lower()
    except ValueError:
        return f"reason {reason}"
