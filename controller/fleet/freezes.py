# SPDX-License-Identifier: Apache-2.0
"""Freezes and drains. Keys and values are what the store keeps, so that both sides are compared as they are."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

MAX_FREEZES = 65536
FLEET = "fleet"


def host_key(node_id: str) -> str:
    return f"host:{node_id}"


def vm_key(vm_id: str) -> str:
    return f"vm:{vm_id}"


@dataclass(frozen=True, slots=True)
class Freeze:
    """Nothing new is evicted from what this covers; `drain` also brings everything back first."""

    why: str = ""
    author: str = ""
    drain: bool = False
    at_unix_ns: int = 0

    def dump(self) -> str:
        return json.dumps({"why": self.why, "author": self.author, "drain": self.drain, "at_unix_ns": self.at_unix_ns})

    @staticmethod
    def load(text: str) -> Freeze:
        """Read leniently: a flag that is there but unreadable still freezes."""
        try:
            data = json.loads(text)
            return Freeze(
                why=str(data.get("why", "")),
                author=str(data.get("author", "")),
                drain=data.get("drain") is True,
                at_unix_ns=int(data.get("at_unix_ns", 0)),
            )
        except (ValueError, AttributeError, TypeError):
            return Freeze(why="(unreadable)")


class Freezes:
    """All flags in force. Changes that the store has not seen yet are remembered until it has."""

    def __init__(self) -> None:
        self._flags: dict[str, Freeze] = {}
        self.unsaved: set[str] = set()

    def get(self, key: str) -> Freeze | None:
        return self._flags.get(key)

    @property
    def fleet(self) -> Freeze | None:
        return self._flags.get(FLEET)

    def put(self, key: str, why: str, author: str, drain: bool = False) -> Freeze:
        """Freeze at once; a drain asked for stays a drain. OverflowError beyond MAX_FREEZES."""
        before = self._flags.get(key)
        if before is None and len(self._flags) >= MAX_FREEZES:
            raise OverflowError(f"{MAX_FREEZES} freezes are in force already; unfreeze some, or freeze the fleet")
        drain = drain or (before is not None and before.drain)
        flag = Freeze(why=why, author=author, drain=drain, at_unix_ns=time.time_ns())
        self._flags[key] = flag
        self.unsaved.add(key)
        return flag

    def drop(self, key: str) -> bool:
        """Unfreeze; False when it was not frozen. The caller has told the store first."""
        self.unsaved.discard(key)
        return self._flags.pop(key, None) is not None

    def merge(self, stored: Mapping[str, str]) -> bool:
        """Take over what the store has; flags it has not seen yet stay. True when anything changed."""
        flags = {key: Freeze.load(text) for key, text in list(stored.items())[:MAX_FREEZES]}
        flags.update({key: self._flags[key] for key in self.unsaved if key in self._flags})
        changed = flags != self._flags
        self._flags = flags
        return changed

    def dump(self) -> dict[str, str]:
        return {key: flag.dump() for key, flag in self._flags.items()}
