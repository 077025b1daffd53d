# SPDX-License-Identifier: Apache-2.0
"""The host's own limits: a local YAML file that can only tighten what a controller or a policy file allows.

Without a file nothing is evicted on a controller's word: eviction is an opt-in of the host
(``allow_evict: true``). docs/agent.md has the table of keys.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from frostline.agent.trackers import parse_trackers
from frostline.controller.policy.loader import MAX_DOCUMENT_BYTES, DocumentError, parse
from frostline.controller.policy.quantity import Amount, parse_amount, parse_rate
from frostline.native import Tracker
from frostline.wire.units import format_size, parse_duration

DEFAULT_PATH: Final = Path("/etc/frostline/limits.yaml")
MAX_VMS: Final = 4096
MIN_SCAN_SECONDS: Final = 0.1
MAX_SCAN_SECONDS: Final = 3600.0
MAX_IO_SECONDS: Final = 60.0


class LimitsError(ValueError):
    """A limits file that cannot be used; the message says where and why."""


def _amount(value: object) -> Amount:
    return value if isinstance(value, Amount) else parse_amount(value)


def _bytes(value: object) -> int:
    amount = parse_amount(value)
    if amount.bytes is None or amount.bytes == 0:
        raise ValueError(f"{value!r} is not a size above 0; write it like 4GiB")
    return amount.bytes


def _permille(value: object) -> int:
    percent = parse_amount(value).percent
    if percent is None or not 0.1 <= percent <= 100:
        raise ValueError(f"{value!r} is not a share between 0.1% and 100%")
    return round(percent * 10)


def _seconds(value: object, low: float, high: float, limits: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a duration; write it like 5s or 500ms")
    seconds = parse_duration(value)
    if not low <= seconds <= high:
        raise ValueError(f"{value!r} is out of range; give {limits}")
    return seconds


def _scan_seconds(value: object) -> float:
    return _seconds(value, MIN_SCAN_SECONDS, MAX_SCAN_SECONDS, "100ms to 1h")


def _io_seconds(value: object) -> float:
    return _seconds(value, 0.0, MAX_IO_SECONDS, "0s to 60s")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, arbitrary_types_allowed=True)


_Names = Annotated[list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=MAX_VMS)]


class VmLimits(_Strict):
    """Tighter limits for one VM, by its id, UUID or name; what is looser than the host's changes nothing."""

    denied: bool = False
    vm_class: str = Field(default="", alias="class", max_length=63)
    max_away: Annotated[Amount, BeforeValidator(_amount)] | None = None
    min_resident: Annotated[Amount, BeforeValidator(_amount)] | None = None
    max_rate: Annotated[int, BeforeValidator(parse_rate)] = 0


class LimitsDocument(_Strict):
    """The file."""

    version: Literal[1]
    allow_evict: bool = False
    observe_unasked: bool = True
    denied: _Names = Field(default_factory=list)
    only: _Names | None = None
    max_away: Annotated[Amount, BeforeValidator(_amount)] = Amount(percent=100.0)
    min_resident: Annotated[Amount, BeforeValidator(_amount)] = Amount(bytes=0)
    max_rate: Annotated[int, BeforeValidator(parse_rate)] = 0
    pool_max: Annotated[int, BeforeValidator(_bytes)] | None = None
    vm_pool_max: Annotated[int, BeforeValidator(_bytes)] | None = None
    stall_target: Annotated[int, BeforeValidator(_permille)] | None = None
    fault_threads: Annotated[int, Field(ge=1, le=16)] | None = None
    scan_interval: Annotated[float, BeforeValidator(_scan_seconds)] | None = None
    longest_io: Annotated[float, BeforeValidator(_io_seconds)] | None = None
    trackers: Annotated[tuple[Tracker, ...] | None, BeforeValidator(parse_trackers)] = None
    vms: dict[str, VmLimits] = Field(default_factory=dict, max_length=MAX_VMS)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the host leaves of a budget; ``sentence`` says which limit cut it, empty when none did."""

    bytes: int
    rate_bytes_per_second: int
    sentence: str


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits in force. ``source`` says where they came from, for people."""

    document: LimitsDocument
    source: str
    evict_by_default: bool = False

    @property
    def allow_evict(self) -> bool:
        if self.evict_by_default and "allow_evict" not in self.document.model_fields_set:
            return True
        return self.document.allow_evict

    def denied(self, names: Iterable[str]) -> bool:
        """Whether a VM with these names (id, UUID, name) must never be attached to."""
        known = [name for name in names if name]
        if self.document.only is not None and not any(name in self.document.only for name in known):
            return True
        return any(name in self.document.denied for name in known) or any(rule.denied for rule in self._rules(known))

    def vm_class(self, names: Iterable[str]) -> str:
        """The class that this host's file gives the VM; empty: the policy's default."""
        return next((rule.vm_class for rule in self._rules(names) if rule.vm_class), "")

    def judge(self, names: Iterable[str], memory_bytes: int, wanted_bytes: int, wanted_rate: int) -> Verdict:
        """What of a wanted budget the host allows. A rate of 0 means no limit, here as in a budget."""
        rules = list(self._rules(names))
        rates = [rate for rate in (wanted_rate, self.document.max_rate, *(r.max_rate for r in rules)) if rate > 0]
        rate = min(rates, default=0)
        if wanted_bytes > 0 and not self.allow_evict:
            return Verdict(0, rate, f"allow_evict is off in {self.source}")
        away = [self.document.max_away, *(rule.max_away for rule in rules if rule.max_away is not None)]
        kept = [self.document.min_resident, *(rule.min_resident for rule in rules if rule.min_resident is not None)]
        most_away = min(amount.of(memory_bytes) for amount in away)
        least_kept = max(amount.of(memory_bytes) for amount in kept)
        allowed = max(0, min(most_away, memory_bytes - least_kept))
        if wanted_bytes <= allowed:
            return Verdict(wanted_bytes, rate, "")
        key = "max_away" if most_away <= memory_bytes - least_kept else "min_resident"
        return Verdict(allowed, rate, f"{key} in {self.source} leaves {format_size(allowed)}")

    def vm_pool_bytes(self) -> int | None:
        """Most host RAM that one VM's compressed pool may take; None: the pager's default."""
        given = [size for size in (self.document.pool_max, self.document.vm_pool_max) if size is not None]
        return min(given, default=None)

    def _rules(self, names: Iterable[str]) -> Iterable[VmLimits]:
        return (self.document.vms[name] for name in dict.fromkeys(names) if name in self.document.vms)


def without_file(*, evict_by_default: bool = False) -> Limits:
    """What holds where there is no limits file."""
    return Limits(LimitsDocument(version=1), "the built-in limits (there is no limits file)", evict_by_default)


def parse_limits(text: str, source: str, *, evict_by_default: bool = False) -> Limits:
    """Check a document whole. Raises LimitsError that names every problem."""
    try:
        document = LimitsDocument.model_validate(parse(text))
    except DocumentError as error:
        raise LimitsError(f"limits file {source} is not valid: {error}") from None
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_context=False)
        )
        raise LimitsError(f"limits file {source} is not valid: {problems}") from None
    return Limits(document, source, evict_by_default)


def load_limits(path: Path | None, *, evict_by_default: bool = False) -> Limits:
    """Read the file; with None the default path if it is there, else the built-in limits. Raises LimitsError."""
    chosen = path or DEFAULT_PATH
    try:
        with chosen.open("rb") as file:
            raw = file.read(MAX_DOCUMENT_BYTES + 1)
        text = raw.decode("utf-8")
    except FileNotFoundError as error:
        if path is None:
            return without_file(evict_by_default=evict_by_default)
        raise LimitsError(
            f"cannot read limits file {chosen}: {error.strerror}; create it or leave --limits out"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise LimitsError(f"cannot read limits file {chosen}: {error}") from None
    return parse_limits(text, str(chosen), evict_by_default=evict_by_default)
