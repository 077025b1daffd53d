# SPDX-License-Identifier: Apache-2.0
"""Sizes, durations and rates as people write them, and back.

Sizes are binary only: `512 MiB` is understood, `512 MB` is refused with the binary unit it probably meant, because
a policy that silently means 5 % less than its author thought is worse than an error. Parsing is exact (no floats),
so `parse_size(format_size_exact(n)) == n` for every size, and likewise for durations of whole milliseconds.
"""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Final

MAX_SIZE_BYTES: Final = 2**63 - 1
MAX_DURATION_SECONDS: Final = 100 * 365 * 86400
_MAX_TEXT: Final = 64

_SIZE_UNITS: Final[dict[str, int]] = {
    "B": 1,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
    "PiB": 2**50,
    "EiB": 2**60,
}
_SIZE_BY_FOLDED: Final = {name.lower(): factor for name, factor in _SIZE_UNITS.items()}
# What people write when they mean the binary unit.
_SIZE_LOOKALIKES: Final[dict[str, str]] = {
    spelling: f"{letter.upper()}iB" for letter in "kmgtpe" for spelling in (letter, f"{letter}b", f"{letter}i")
}

_MS_BY_UNIT: Final[dict[str, int]] = {
    "ms": 1,
    "s": 1000,
    "m": 60_000,
    "min": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
}
_DURATION_STEPS: Final[tuple[tuple[str, int], ...]] = (("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1000))

_NUMBER: Final = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)", re.ASCII)
_DURATION_PART: Final = re.compile(r"(?P<number>[0-9]+(?:\.[0-9]+)?)(?P<unit>ms|min|[smhd])\s*", re.ASCII)


class UnitError(ValueError):
    """A text that is not a size, duration or rate; the message says what would be."""


def parse_size(text: str | int) -> int:
    """Bytes of `"1.5GiB"`, `"512 MiB"`, `"1048576"` or a plain integer, rounded down to a whole byte.

    Raises UnitError for negative sizes, decimal units, unknown units and anything above 2**63 - 1.
    """
    if isinstance(text, bool) or not isinstance(text, (int, str)):
        raise UnitError(f"not a size: {_quoted(text)}; write a number of bytes or a text such as '512 MiB'")
    if isinstance(text, int):
        return _checked_size(Fraction(text), str(text))
    stripped = text.strip()
    match = _NUMBER.fullmatch(stripped) if len(stripped) <= _MAX_TEXT else None
    if match is None:
        if stripped.startswith("-"):
            raise UnitError(f"a size cannot be negative: {_quoted(text)}")
        raise UnitError(f"not a size: {_quoted(text)}; write for example '512 MiB', '1.5GiB' or '1048576'")
    number, unit = Fraction(match["number"]), match["unit"]
    if not unit:
        if number.denominator != 1:
            raise UnitError(f"not a whole number of bytes: {_quoted(text)}; add a unit, such as '{match['number']}GiB'")
        return _checked_size(number, text)
    factor = _SIZE_BY_FOLDED.get(unit.lower())
    if factor is None:
        meant = _SIZE_LOOKALIKES.get(unit.lower())
        if meant is not None:
            raise UnitError(f"sizes are binary here: {_quoted(text)} should be '{match['number']}{meant}'")
        raise UnitError(f"unknown unit {unit!r} in {_quoted(text)}; known are {', '.join(_SIZE_UNITS)}")
    return _checked_size(number * factor, text)


def format_size(size_bytes: int) -> str:
    """A size for people: three significant digits and a binary unit, such as `1.50 GiB`, `96.0 KiB` or `12 B`."""
    if size_bytes < 0:
        raise UnitError(f"a size cannot be negative: {size_bytes}")
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB", "PiB", "EiB"):
        value /= 1024
        # 1023.96 KiB would be shown as 1024 KiB: the next unit says it better.
        if value < 1023.5 or unit == "EiB":
            digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
            return f"{value:.{digits}f} {unit}"
    raise AssertionError("unreachable")


def format_size_exact(size_bytes: int) -> str:
    """A size that `parse_size` reads back exactly: the largest unit that divides it, such as `1536 MiB`."""
    if size_bytes < 0:
        raise UnitError(f"a size cannot be negative: {size_bytes}")
    name = "B"
    for candidate, factor in _SIZE_UNITS.items():
        if size_bytes and size_bytes % factor == 0:
            name = candidate
    return f"{size_bytes // _SIZE_UNITS[name]} {name}"


def parse_duration(text: str | float) -> float:
    """Seconds of `"90s"`, `"2m"`, `"1h30m"`, `"250ms"`, `"1d"`, `"1.5h"`, or of a number that already is seconds.

    Units must come in falling order and each at most once; `m` and `min` are minutes. A text without a unit is
    refused: nobody can tell whether it meant seconds or milliseconds.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str)):
        raise UnitError(f"not a duration: {_quoted(text)}; write seconds or a text such as '90s' or '1h30m'")
    if not isinstance(text, str):
        return _checked_duration(text, text)
    stripped = text.strip()
    total_ms, position, last_factor = Fraction(0), 0, None
    while position < len(stripped):
        match = _DURATION_PART.match(stripped, position) if len(stripped) <= _MAX_TEXT else None
        if match is None:
            break
        factor = _MS_BY_UNIT[match["unit"]]
        if last_factor is not None and factor >= last_factor:
            raise UnitError(f"units out of order in {_quoted(text)}; write days, hours, minutes, seconds: '1d2h3m4s'")
        total_ms += Fraction(match["number"]) * factor
        position, last_factor = match.end(), factor
    if last_factor is None or position < len(stripped):
        if stripped.startswith("-"):
            raise UnitError(f"a duration cannot be negative: {_quoted(text)}")
        if re.fullmatch(r"[0-9]+(\.[0-9]+)?", stripped):
            raise UnitError(f"a duration needs a unit: {_quoted(text)} should be '{stripped}s' for seconds")
        raise UnitError(f"not a duration: {_quoted(text)}; write for example '90s', '2m', '1h30m' or '250ms'")
    return _checked_duration(float(total_ms / 1000), text)


def format_duration(seconds: float, *, parts: int = 4) -> str:
    """A duration for people: `250ms`, `12.5s`, `1m30s`, `2h`, `3d4h`; rounded to milliseconds.

    `parts` limits how many units are shown, largest first; what is cut off is dropped, not rounded, except that
    seconds are whole from a minute on when parts < 4.
    """
    if not seconds >= 0 or seconds > MAX_DURATION_SECONDS:
        raise UnitError(f"not a duration that can be shown: {seconds} seconds")
    total_ms = round(seconds * 1000)
    if total_ms < 1000:
        return f"{total_ms}ms" if total_ms else "0s"
    pieces: list[str] = []
    rest_ms = total_ms
    for unit, factor in _DURATION_STEPS:
        count, rest_ms = divmod(rest_ms, factor)
        if unit == "s" and rest_ms and (parts >= 4 or not pieces):
            pieces.append(f"{count + rest_ms / 1000:.3f}".rstrip("0") + "s")
            break
        if count:
            pieces.append(f"{count}{unit}")
        elif pieces and parts < 4:
            break  # 3d0h5m is not what anybody wants to read in a table
        if len(pieces) == parts:
            break
    return "".join(pieces)


def parse_rate(text: str | int) -> int:
    """Bytes a second of `"64MiB/s"`, `"1 GiB/min"`, a plain number of bytes a second, or 0 for `"unlimited"`."""
    if isinstance(text, int) and not isinstance(text, bool):
        return parse_size(text)
    if not isinstance(text, str):
        raise UnitError(f"not a rate: {_quoted(text)}; write for example '64 MiB/s'")
    stripped = text.strip()
    if stripped == "unlimited":
        return 0
    amount, slash, per = stripped.partition("/")
    if not slash:
        if stripped.isascii() and stripped.isdigit():
            return parse_size(stripped)
        raise UnitError(f"not a rate: {_quoted(text)}; write for example '64 MiB/s', '1 GiB/min' or 'unlimited'")
    seconds_by_unit = {"s": 1, "m": 60, "min": 60, "h": 3600}
    divisor = seconds_by_unit.get(per.strip())
    if divisor is None:
        raise UnitError(f"unknown time unit in {_quoted(text)}; a rate is a size per s, min or h, such as '64 MiB/s'")
    rate = parse_size(amount) // divisor
    if rate == 0:
        raise UnitError(f"less than a byte a second: {_quoted(text)}; write 'unlimited' for no limit")
    return rate


def format_rate(bytes_per_second: int) -> str:
    """A rate for people, such as `64.0 MiB/s`; 0 is `unlimited`, as in budgets."""
    return "unlimited" if bytes_per_second == 0 else f"{format_size(bytes_per_second)}/s"


def _checked_size(value: Fraction, text: object) -> int:
    if value < 0:
        raise UnitError(f"a size cannot be negative: {_quoted(text)}")
    if value > MAX_SIZE_BYTES:
        raise UnitError(f"too large a size: {_quoted(text)}; the most is {MAX_SIZE_BYTES} bytes (8 EiB less one byte)")
    return int(value)


def _checked_duration(seconds: float, text: object) -> float:
    if seconds < 0:
        raise UnitError(f"a duration cannot be negative: {_quoted(text)}")
    if not seconds <= MAX_DURATION_SECONDS:
        raise UnitError(f"too long a duration: {_quoted(text)}; the most is 100 years")
    return float(seconds)


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_TEXT + 2 else text[:_MAX_TEXT] + "...'"
