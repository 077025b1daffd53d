# SPDX-License-Identifier: Apache-2.0
"""From decisions to the budget set of a host, and whether it is worth sending. Pure, apart from the records."""

from __future__ import annotations

from dataclasses import dataclass

from frostline.controller.policy.document import PolicyMode
from frostline.controller.policy.snapshot import Decision
from frostline.v1 import common_pb2 as pb
from frostline.v1 import session_pb2 as wire

_DEADBAND_SHARE = 0.01
_DEADBAND_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class Sent:
    """What a host was last told of one VM."""

    mode: int
    bytes: int
    rate_bytes_per_second: int
    min_age_seconds: float
    reason: int


def to_budget(vm_id: str, decision: Decision) -> wire.Budget:
    """Every VM is in the set with its mode, so that its agent knows what to do; only ENFORCE ever carries bytes."""
    enforced = decision.mode is PolicyMode.ENFORCE
    return wire.Budget(
        vm_id=vm_id,
        mode=pb.Mode.ValueType(int(decision.mode)),
        bytes=decision.budget_bytes if enforced else 0,
        rate_bytes_per_second=decision.rate_bytes_per_second,
        min_age_seconds=decision.min_age_seconds,
        reason=pb.Reason.ValueType(decision.reason),
    )


def to_sent(budget: wire.Budget) -> Sent:
    return Sent(budget.mode, budget.bytes, budget.rate_bytes_per_second, budget.min_age_seconds, budget.reason)


def deadband_bytes(memory_bytes: int) -> int:
    """Smaller changes wait for the lease's renewal: 1 % of the memory or 16 MiB, whichever is more."""
    return max(int(memory_bytes * _DEADBAND_SHARE), _DEADBAND_BYTES)


def is_change(old: Sent | None, new: Sent, memory_bytes: int) -> bool:
    """Whether a VM's budget changed by more than noise. To or from nothing, and any other field, always counts."""
    if old is None:
        return True
    if (old.mode, old.rate_bytes_per_second, old.min_age_seconds, old.reason) != (
        new.mode,
        new.rate_bytes_per_second,
        new.min_age_seconds,
        new.reason,
    ):
        return True
    if old.bytes == new.bytes:
        return False
    if new.bytes == 0 or old.bytes == 0:
        return True
    if new.reason == pb.REASON_FROZEN and new.bytes < old.bytes:
        # Frozen means nothing new: what came back must not find room to go again.
        return True
    return abs(new.bytes - old.bytes) > deadband_bytes(memory_bytes)


def needs_push(old: dict[str, Sent] | None, new: dict[str, Sent], memory_bytes: dict[str, int]) -> bool:
    """Whether a new set must be sent before its lease is due: first one, other VMs, or a change that counts."""
    if old is None or old.keys() != new.keys():
        return True
    return any(is_change(old[vm_id], sent, memory_bytes.get(vm_id, 0)) for vm_id, sent in new.items())
