# SPDX-License-Identifier: Apache-2.0
"""What a decision is made from, and what comes out of it. Immutable, plain values only."""

from __future__ import annotations

from dataclasses import dataclass

from frostline.controller.policy.document import PolicyMode, Rule


@dataclass(frozen=True, slots=True)
class Bin:
    """A bin of the cold-age histogram: what was last touched at least `min_age_seconds` ago."""

    min_age_seconds: float
    resident_bytes: int
    evicted_bytes: int = 0


@dataclass(frozen=True, slots=True)
class VmSnapshot:
    """One VM as its agent last described it. Sizes are bytes of guest memory."""

    vm_id: str
    name: str = ""
    uuid: str = ""
    vm_class: str = ""  # asked for by a label on the host
    memory_bytes: int = 0
    resident_bytes: int = 0
    evicted_bytes: int = 0
    bins: tuple[Bin, ...] = ()
    scans: int = 0
    refusal: str = ""  # why it is not served, for people; empty: nothing is in the way
    corrupt: bool = False  # a checksum failed
    report_age_seconds: float | None = None  # None: no usable report yet
    problem: str = ""  # why the last report was not used; what is here is from the one before

    @property
    def label(self) -> str:
        """How people call it."""
        return self.name or self.vm_id


@dataclass(frozen=True, slots=True)
class Flags:
    """What operators and the session say beside the policy."""

    fleet_frozen: bool = False
    host_frozen: bool = False
    vm_frozen: bool = False
    draining: bool = False  # an operator wants everything back; ends in a frozen VM
    last_budget_bytes: int = 0
    report_seconds: float = 60.0

    @property
    def frozen(self) -> str:
        """The widest thing that is frozen, or an empty string."""
        if self.fleet_frozen:
            return "fleet"
        if self.host_frozen:
            return "host"
        return "VM" if self.vm_frozen or self.draining else ""


@dataclass(frozen=True, slots=True)
class Decision:
    """What a VM may have away and why. `budget_bytes` goes to the agent, `planned_bytes` is what ENFORCE would send."""

    mode: PolicyMode
    budget_bytes: int
    planned_bytes: int
    cold_bytes: int
    min_age_seconds: float
    rate_bytes_per_second: int
    reason: int  # frostline.v1.Reason
    policy_class: str
    sentence: str
    rule: Rule
