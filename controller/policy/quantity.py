# SPDX-License-Identifier: Apache-2.0
"""Sizes, shares, rates and durations of a policy document: frostline.wire.units within a policy's own limits."""

from __future__ import annotations

import re
from dataclasses import dataclass

from frostline.wire import units

MAX_BYTES = 1 << 60
MIN_SECONDS, MAX_SECONDS = 1.0, 30 * 86400.0
# On the wire a rate of 0 means "no limit", so nobody may write 0 and get the opposite of what it says.
UNLIMITED = 0
_PERCENT = re.compile(r"\s*(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*%\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Amount:
    """Bytes, or a share of a VM's memory: exactly one of the two."""

    bytes: int | None = None
    percent: float | None = None

    def of(self, memory_bytes: int) -> int:
        """Bytes that this is for a VM with `memory_bytes`, rounded down."""
        if self.percent is not None:
            return int(memory_bytes * self.percent / 100.0)
        return self.bytes or 0

    def __str__(self) -> str:
        if self.percent is not None:
            return f"{self.percent:g} %"
        return units.format_size(self.bytes or 0)


def parse_amount(value: object) -> Amount:
    """`256MiB`, `20%` or a number of bytes. ValueError says what is wrong and what to write."""
    match = _PERCENT.fullmatch(value) if isinstance(value, str) else None
    if match is not None:
        percent = float(match.group(1))
        if percent < 0:
            raise ValueError(f"{value} is negative; give 0% or more")
        if percent > 100:
            raise ValueError(f"{value} is more than the whole memory; give 100% or less")
        return Amount(percent=percent)
    if not isinstance(value, (str, int)):
        raise ValueError(f"{value!r} is not a size; write it like 256MiB or 20%")
    if isinstance(value, int) and value < 0:
        raise ValueError(f"{value} is negative; give 0 or more")
    size = units.parse_size(value)
    if size > MAX_BYTES:
        raise ValueError(f"{value} is more than 1 EiB; give less")
    return Amount(bytes=size)


def parse_rate(value: object) -> int:
    """`64MiB/s` or `unlimited`; bytes per second, UNLIMITED for no limit."""
    if not isinstance(value, (str, int)):
        raise ValueError(f"{value!r} is not a rate; write it like 64MiB/s or unlimited")
    rate = units.parse_rate(value)
    if rate == UNLIMITED and value != "unlimited":
        raise ValueError("a rate of 0 evicts nothing; use mode: plan for that, or unlimited for no limit")
    if rate > MAX_BYTES:
        raise ValueError(f"{value} is more than 1 EiB/s; write unlimited")
    return rate


def parse_duration(value: object) -> float:
    """`120s`, `2m`, `1h30m`, `1d` or a number of seconds; seconds."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"{value!r} is not a duration; write it like 120s or 5m")
    try:
        seconds = units.parse_duration(value)
    except OverflowError:
        raise ValueError("a duration that long is no duration; give 1s to 30d") from None
    if not MIN_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(f"{value} is out of range; give 1s to 30d")
    return seconds
