# SPDX-License-Identifier: Apache-2.0
"""SPECIFICATION.md promises nothing without a test and a command, and both are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "SPECIFICATION.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in TEXT.splitlines()
    if line.startswith("| ") and not line.startswith(("| promise ", "| --- "))
]
TESTS = re.compile(r"(?:tests|native/tests|\.ci)/[\w./-]+(?:::\w+)?")


def test_every_section_has_promises() -> None:
    sections = re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]
    assert len(sections) >= 6
    assert [
        section.splitlines()[0] for section in sections if len(re.findall(r"^\| ", section, re.MULTILINE)) < 3
    ] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0][:50] if isinstance(row, list) else "")
def test_a_promise_has_its_number_test_and_command(row: list[str]) -> None:
    assert len(row) == 4 and all(row), row
    _promise, _number, tests, command = row
    named = TESTS.findall(tests) or re.findall(r"native/tests", tests)
    assert named, tests
    for name in named:
        path, _, function = name.rstrip(".").partition("::")
        assert (ROOT / path).exists(), name
        if function:
            assert f"def {function}(" in (ROOT / path).read_text(encoding="utf-8"), name
    run = re.fullmatch(r"`make ([a-z -]+)`", command)
    assert run, command
    for target in run.group(1).split():
        assert re.search(rf"^(?:[a-z -]+ )?{target}(?: [a-z -]+)?:", MAKEFILE, re.MULTILINE), target


TRACKED = [path for kind in ("tracker", "rwp", "evict") for path in sorted(ROOT.glob(f"native/tests/test_{kind}_*.c"))]


@pytest.mark.parametrize("path", TRACKED, ids=lambda path: path.stem)
def test_what_is_tried_on_trackers_and_evictions_is_promised(path: Path) -> None:
    assert f"native/tests/{path.name}" in TEXT
