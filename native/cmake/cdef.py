# SPDX-License-Identifier: Apache-2.0
"""Derive cffi's declarations from the public header, so that the header stays the one source.

The compiler's preprocessor resolves conditions and macros; of its output only the lines that come from the
header's own folder are kept. Integer constants (``#define FL_X 123``) become ``#define FL_X ...``, whose values
cffi takes from the compiler. Attributes, assertions and inline bodies, which cffi cannot read, are taken out.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

LINE_MARKER = re.compile(r'^# \d+ "([^"]*)"')
DEFINE = re.compile(r"^#define\s+(\w+)(\(?)\s*(.*)$")
# What an integer constant may be made of: numbers, names, operators, casts by UINT64_C and its kin.
INTEGER = re.compile(r"^[\s()|&^~+*/%<>\-]*(?:(?:0[xX][0-9a-fA-F]+|\d+)[uUlL]*|\w+|[\s()|&^~+*/%<>\-])+$")
NUMBER_MACRO = re.compile(r"^U?INT(8|16|32|64|MAX)_C$")
WORD = re.compile(r"\b[A-Za-z_]\w*")
COMPILER_TIME_LIMIT_SECONDS = 60


def preprocess(cc: str, header: Path) -> list[str]:
    """The preprocessed lines, ``#define`` lines included, that come from files in the header's folder."""
    command = [cc, "-std=c11", "-D_GNU_SOURCE", "-DFL_CDEF=1", "-E", "-dD", str(header)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=COMPILER_TIME_LIMIT_SECONDS, check=False)
    if run.returncode != 0:
        sys.exit(f"cannot preprocess {header} ({' '.join(command)}): {run.stderr.strip()}")
    kept: list[str] = []
    ours = False
    for line in run.stdout.splitlines():
        marker = LINE_MARKER.match(line)
        if marker:
            ours = Path(marker.group(1)).parent == header.parent
        elif ours and line.strip():
            kept.append(line)
    return kept


def constants(lines: list[str], enumerators: set[str]) -> list[str]:
    """A ``#define NAME ...`` for each macro whose value is an integer expression over known names."""
    known = set(enumerators)
    found: list[str] = []
    for line in lines:
        match = DEFINE.match(line)
        if not match:
            continue
        name, call, value = match.groups()
        words = WORD.findall(re.sub(r"\b(0[xX][0-9a-fA-F]+|\d+)[uUlL]*", "", value))
        if call or not value or not INTEGER.match(value):
            continue
        if all(word in known or NUMBER_MACRO.match(word) for word in words):
            known.add(name)
            found.append(f"#define {name} ...")
    return found


def without_calls(text: str, name: str) -> str:
    """``text`` without every ``name(...)``, however deep its parentheses go, and without a semicolon after it."""
    pattern = re.compile(rf"\b{name}\s*\(")
    while match := pattern.search(text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        if name.endswith("ssert"):
            end = text.index(";", end) + 1
        text = text[: match.start()] + text[end:]
    return text


def without_inline_functions(text: str) -> str:
    """``text`` without ``static inline`` functions: they are for C callers only."""
    pattern = re.compile(r"\bstatic\s+(?:inline|__inline__|__inline)\b[^;{]*\{")
    while match := pattern.search(text):
        depth, end = 1, match.end()
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: match.start()] + text[end:]
    return text


def declarations(cc: str, header: Path) -> str:
    """The text for cffi's ``cdef``."""
    lines = preprocess(cc, header)
    text = "\n".join(line for line in lines if not line.startswith("#"))
    for name in ("__attribute__", "_Static_assert", "_Alignas"):
        text = without_calls(text, name)
    text = without_inline_functions(text)
    text = re.sub(r"\b(?:__extension__|__restrict__|__restrict|restrict|_Noreturn)\b", "", text)
    enumerators = set()
    for body in re.findall(r"\benum\b[^{;]*\{([^}]*)\}", text):
        enumerators.update(re.findall(r"(?:^|,)\s*([A-Za-z_]\w*)", body))
    head = "/* Made from frostline.h by cdef.py. */\n"
    return head + "\n".join(constants(lines, enumerators)) + "\n" + text + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cc", required=True, help="the C compiler")
    parser.add_argument("header", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.write_text(declarations(arguments.cc, arguments.header.resolve()), encoding="utf-8")


if __name__ == "__main__":
    main()
