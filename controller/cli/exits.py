# SPDX-License-Identifier: Apache-2.0
"""What the command's exit codes mean. docs/cli.md and `frostline --help` show the same table."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    UNREACHABLE = 3
    NOT_FOUND = 4
    REFUSED = 5
    CONFLICT = 6
    STORE_UNAVAILABLE = 7
    NOT_DONE = 8
    INTERRUPTED = 130
    READER_GONE = 141


EXIT_MEANINGS: dict[Exit, str] = {
    Exit.OK: "done",
    Exit.UNEXPECTED: "something unexpected; the message says what",
    Exit.USAGE: "the command line is not right",
    Exit.UNREACHABLE: "the controller cannot be reached, or does not answer in time",
    Exit.NOT_FOUND: "no such host, VM or policy version",
    Exit.REFUSED: "refused: an invalid document, an ambiguous name, or not allowed",
    Exit.CONFLICT: "somebody else changed the policy first",
    Exit.STORE_UNAVAILABLE: "the controller is there, its state store is not",
    Exit.NOT_DONE: "asked for, but not finished within the time limit",
    Exit.INTERRUPTED: "interrupted (Ctrl-C)",
    Exit.READER_GONE: "whatever read the output closed it",
}


def epilog() -> str:
    lines = [f"{int(code):>3}  {meaning}" for code, meaning in EXIT_MEANINGS.items()]
    return "Exit codes:\n" + "\n".join(lines)
