# SPDX-License-Identifier: Apache-2.0
"""Without a controller: a local policy file, decided on by the controller's own pure code.

What comes out is a budget set like any other, with this agent as its author, and it is applied by the same path.
The file is looked at before each decision; one that is no longer valid leaves the last good one in force.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import structlog

from frostline.agent.authority import Authority
from frostline.agent.report import PromotionRates, identity, vm_state
from frostline.agent.traces import Traces
from frostline.agent.vm import Vm
from frostline.controller.policy.decide import decide
from frostline.controller.policy.document import Policy, load
from frostline.controller.policy.loader import MAX_DOCUMENT_BYTES, DocumentError
from frostline.controller.policy.snapshot import Bin, Flags, VmSnapshot
from frostline.v1 import common_pb2, session_pb2
from frostline.wire.telemetry import traceparent_of

DEFAULT_DECISION_SECONDS: Final = 10.0
LEASE_DECISIONS: Final = 3.0
MIN_LEASE_SECONDS: Final = 5.0

_log: Final = structlog.stdlib.get_logger("frostline.agent.standalone")


class PolicyError(ValueError):
    """A policy file that cannot be used; the message says where and why."""


def load_policy(path: Path) -> Policy:
    """Read and check a policy file whole. Raises PolicyError."""
    try:
        with path.open("rb") as file:
            text = file.read(MAX_DOCUMENT_BYTES + 1).decode("utf-8")
        return load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"cannot read policy file {path}: {error}") from None
    except DocumentError as error:
        raise PolicyError(f"policy file {path} is not valid: {error}") from None


class Standalone:
    """Decides every ``decision_seconds`` on this host's VMs; ``run`` until cancelled."""

    def __init__(
        self,
        path: Path,
        vms: Callable[[], Iterable[Vm]],
        authority: Authority,
        traces: Traces,
        decision_seconds: float,
    ) -> None:
        """Raises PolicyError when the file is not valid now."""
        self.policy = load_policy(path)
        self._path: Final = path
        self._vms: Final = vms
        self._authority: Final = authority
        self._traces: Final = traces
        self._decision_seconds: Final = decision_seconds
        self._rates: Final = PromotionRates()
        self._last_bytes: dict[str, int] = {}
        self._rejected = ""
        self._version = authority.applied_version
        self._wake: Final = asyncio.Event()

    def decide_soon(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        while True:
            self._wake.clear()
            self._reload()
            await self._decide()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), self._decision_seconds)

    def _reload(self) -> None:
        try:
            policy = load_policy(self._path)
        except PolicyError as error:
            if str(error) != self._rejected:
                self._rejected = str(error)
                _log.error("the policy file is rejected; the last good one stays in force", why=str(error))
            return
        self._rejected = ""
        if policy.text != self.policy.text:
            _log.info("a new policy is in force", path=str(self._path))
        self.policy = policy

    async def _decide(self) -> None:
        with self._traces.reporting() as traceparent, self._traces.deciding(traceparent) as span:
            self._version += 1
            budget_set = session_pb2.BudgetSet(
                epoch=self._authority.highest_epoch,
                version=self._version,
                lease_seconds=max(MIN_LEASE_SECONDS, LEASE_DECISIONS * self._decision_seconds),
                traceparent=traceparent_of(span),
                issued_at_unix_ns=time.time_ns(),
            )
            for vm in self._vms():
                budget_set.budgets.append(self._budget(vm))
        await self._authority.take(budget_set)

    def _budget(self, vm: Vm) -> session_pb2.Budget:
        rates = self._rates.update(vm.vmm.process, vm.status) if vm.status else ()
        flags = Flags(last_budget_bytes=self._last_bytes.get(vm.vm_id, 0), report_seconds=self._decision_seconds)
        decision = decide(self.policy, snapshot(vm, rates), flags)
        self._last_bytes[vm.vm_id] = decision.budget_bytes
        return session_pb2.Budget(
            vm_id=vm.vm_id,
            mode=common_pb2.Mode.Value(f"MODE_{decision.mode.name}"),
            bytes=decision.budget_bytes,
            rate_bytes_per_second=decision.rate_bytes_per_second,
            min_age_seconds=decision.min_age_seconds,
            reason=common_pb2.Reason.ValueType(decision.reason),
        )


def snapshot(vm: Vm, promotions_per_minute: tuple[float, ...]) -> VmSnapshot:
    """What the policy sees of a VM, from the same report that a controller would get."""
    who, state = identity(vm), vm_state(vm, promotions_per_minute)
    histogram = state.histogram
    bins = tuple(
        Bin(age, resident, away)
        for age, resident, away in zip(
            histogram.min_age_seconds, histogram.resident_bytes, histogram.evicted_bytes, strict=True
        )
    )
    return VmSnapshot(
        vm_id=who.vm_id,
        name=who.name,
        uuid=who.uuid,
        vm_class=who.vm_class,
        memory_bytes=state.memory_bytes,
        resident_bytes=state.resident_bytes,
        evicted_bytes=state.evicted_bytes,
        bins=bins,
        scans=state.counters.scans,
        refusal=state.refusal_detail,
        corrupt=state.pager_state == common_pb2.PAGER_STATE_CORRUPT,
        report_age_seconds=0.0 if vm.status else None,
    )
