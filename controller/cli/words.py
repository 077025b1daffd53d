# SPDX-License-Identifier: Apache-2.0
"""The API's enumerations as the words that people and scripts see, and how serious each is.

Words are the enum's names in lower case (`nothing_cold`); scripts read them in --json, so they do not change.
"""

from __future__ import annotations

import unicodedata
from typing import Final

from google.protobuf.descriptor import EnumDescriptor

from frostline.v1 import common_pb2, operator_pb2

# Enough for any id or name we make; a guest's command line can hold a megabyte.
_MAX_SHOWN: Final = 400


def _word(enum: EnumDescriptor, prefix: str, number: int) -> str:
    """`""` for UNSPECIFIED, `unknown_<n>` for numbers newer than this command."""
    if number == 0:
        return ""
    value = enum.values_by_number.get(number)
    return value.name.removeprefix(prefix).lower() if value is not None else f"unknown_{number}"


def mode_word(number: int) -> str:
    return _word(common_pb2.Mode.DESCRIPTOR, "MODE_", number)


def reason_word(number: int) -> str:
    return _word(common_pb2.Reason.DESCRIPTOR, "REASON_", number)


def refusal_word(number: int) -> str:
    return _word(common_pb2.Refusal.DESCRIPTOR, "REFUSAL_", number)


def pager_word(number: int) -> str:
    return _word(common_pb2.PagerState.DESCRIPTOR, "PAGER_STATE_", number)


def tracker_word(number: int) -> str:
    return _word(common_pb2.Tracker.DESCRIPTOR, "TRACKER_", number)


def freeze_method_word(number: int) -> str:
    return _word(common_pb2.FreezeMethod.DESCRIPTOR, "FREEZE_METHOD_", number)


def host_word(number: int) -> str:
    return _word(operator_pb2.HostState.DESCRIPTOR, "HOST_STATE_", number)


REASON_SENTENCES: Final[dict[str, str]] = {
    "granted": "cold pages may be away, up to the whole cold set",
    "floor": "limited by the floor: that much stays in RAM",
    "cap": "limited by the cap: no more than that may be away",
    "excluded": "excluded by policy",
    "mode": "its mode does not let anything be evicted",
    "warmup": "too young, or too few scans yet",
    "nothing_cold": "no page has been idle for the minimum age",
    "frozen": "frozen: nothing new is evicted",
    "unsafe": "cannot be tiered safely",
    "draining": "an operator drains it",
    "limited_locally": "the host's own limits allow less",
    "lease": "no lease in force",
    "brake": "the local brake holds it back",
    "tier_full": "the pool is full",
    "corrupt": "a checksum failed: nothing is evicted any more",
    "stale": "the controller has no fresh report",
    "unknown_vm": "the agent does not have this VM",
    "epoch": "the budget came from an older controller",
    "invalid": "the budget makes no sense",
    "expired": "the lease had run out on arrival",
    "pager": "the pager did not take it",
    "failed": "evicting failed and is tried again",
    "no_tracker": "no tracker that its host allows works here",
}

_GOOD: Final = {"granted", "connected", "active", "enforce"}
_CALM: Final = {"floor", "cap", "excluded", "mode", "warmup", "nothing_cold", "plan", "observe", "off", "detached"}
_BAD: Final = {
    "corrupt",
    "gone",
    "unsafe",
    "epoch",
    "invalid",
    "expired",
    "unknown_vm",
    "pager",
    "failed",
    "no_tracker",
}


def style_of(word: str) -> str:
    """A rich style for a word: green is well, plain is as wanted, yellow wants a look, red wants a hand."""
    key = word.partition(":")[0]
    if key in _GOOD:
        return "green"
    if key in _BAD:
        return "bold red"
    if key in _CALM or not key or key == "-":
        return ""
    return "yellow"


def clean(text: str) -> str:
    """Text from elsewhere, safe to print: control and direction characters could rewrite the operator's terminal."""
    cut = text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."
    return "".join(char if char == " " or _is_plain(char) else "?" for char in cut)


def _is_plain(char: str) -> bool:
    return not unicodedata.category(char).startswith(("C", "Z"))
