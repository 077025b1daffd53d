# SPDX-License-Identifier: Apache-2.0
"""Exit codes of frostline-agent. They are in `--help`; a test holds the two together."""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class Exit(IntEnum):
    """What an exit code means."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    UNREACHABLE = 4
    BUSY = 5
    UNABLE = 6


MEANINGS: Final[dict[Exit, str]] = {
    Exit.OK: "done",
    Exit.FAILED: "it was tried and failed; the message says what the system said",
    Exit.USAGE: "bad command line, settings, limits file or policy file",
    Exit.NOT_FOUND: "no VM has that id, UUID, name or pid, or more than one has",
    Exit.UNREACHABLE: "no agent answers on the admin socket",
    Exit.BUSY: "another agent has this run folder",
    Exit.UNABLE: "probe: this kernel cannot serve any VM",
}

EPILOG: Final = "Exit codes: " + "; ".join(f"{code.value} {meaning}" for code, meaning in MEANINGS.items()) + "."

FROM_ADMIN: Final[dict[str, Exit]] = {
    "not_found": Exit.NOT_FOUND,
    "ambiguous": Exit.NOT_FOUND,
    "unreachable": Exit.UNREACHABLE,
    "invalid": Exit.USAGE,
}
