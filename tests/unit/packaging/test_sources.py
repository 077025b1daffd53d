# SPDX-License-Identifier: Apache-2.0
"""What holds for every source file: its licence, and a length that can be read."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SOURCE_SUFFIXES = {".py", ".pyi", ".c", ".h", ".S", ".proto", ".cmake", ".sh", ".lua"}
LONGEST_FILE_LINES = 600


def sources() -> list[Path]:
    """The source files that git knows of, or would."""
    run = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if run.returncode != 0:
        pytest.skip(f"not a git checkout: {run.stderr.strip()}")
    paths = (ROOT / name for name in run.stdout.split("\0") if name)
    return [path for path in paths if path.suffix in SOURCE_SUFFIXES and path.is_file()]


def test_each_begins_with_its_licence() -> None:
    files = sources()
    assert files
    without = []
    for path in files:
        first_lines = path.read_text(encoding="utf-8").splitlines()[:2]
        if not any("SPDX-License-Identifier: Apache-2.0" in line for line in first_lines):
            without.append(str(path.relative_to(ROOT)))
    assert without == []


def test_none_is_too_long() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > LONGEST_FILE_LINES} == {}


def test_frostline_stays_a_namespace() -> None:
    package_roots = {path.relative_to(ROOT).parts[0] for path in sources() if path.name == "__init__.py"}
    assert {"agent", "controller", "native", "proto", "tests"} <= package_roots
    assert not (ROOT / "__init__.py").exists()
    assert not (ROOT / "proto" / "__init__.py").exists()
