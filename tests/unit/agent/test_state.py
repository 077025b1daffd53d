# SPDX-License-Identifier: Apache-2.0
"""The state file: the epoch fence survives restarts and damage."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frostline.agent.state import StateError, StateFile


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.json"


def test_what_was_written_is_read_again(path: Path) -> None:
    first = StateFile(path)
    assert (first.state.highest_epoch, first.warning) == (0, "")
    first.update(highest_epoch=7, applied_version=3, off_vm_ids=frozenset({"b", "a"}))
    second = StateFile(path)
    assert second.state == first.state and second.warning == ""
    assert oct(path.stat().st_mode & 0o777) == "0o600"


def test_the_fence_never_goes_back(path: Path) -> None:
    state = StateFile(path)
    state.update(highest_epoch=7)
    with pytest.raises(ValueError, match="cannot go back"):
        state.update(highest_epoch=6)


@pytest.mark.parametrize("cut", [0, 1, 20, 40, -2])
def test_a_half_written_file_still_fences(path: Path, cut: int) -> None:
    state = StateFile(path)
    state.update(highest_epoch=41)
    state.update(highest_epoch=42)
    path.write_bytes(path.read_bytes()[:cut])
    again = StateFile(path)
    # Either the number was still readable, or the predecessor's counts.
    assert again.state.highest_epoch in (41, 42)
    assert "damaged" in again.warning and str(again.state.highest_epoch) in again.warning
    assert path.with_suffix(".corrupt").exists()
    again.update(highest_epoch=43)
    assert StateFile(path).state.highest_epoch == 43


def test_the_unfinished_successor_counts(path: Path) -> None:
    state = StateFile(path)
    state.update(highest_epoch=5)
    path.write_text("garbage")
    path.with_suffix(".previous").unlink(missing_ok=True)
    path.with_suffix(".tmp").write_text('{"format": 1, "highest_epoch": 6, "appl')
    assert StateFile(path).state.highest_epoch == 6


def test_nothing_to_salvage_is_said(path: Path) -> None:
    path.write_text("\0\0\0\0")
    state = StateFile(path)
    assert state.state.highest_epoch == 0 and "no epoch could be salvaged" in state.warning


@pytest.mark.parametrize(
    "body",
    [
        [],
        {"format": 2, "highest_epoch": 9, "applied_version": 0, "off_vm_ids": []},
        {"format": 1, "highest_epoch": -9, "applied_version": 0, "off_vm_ids": []},
        {"format": 1, "highest_epoch": True, "applied_version": 0, "off_vm_ids": []},
        {"format": 1, "highest_epoch": 2**64, "applied_version": 0, "off_vm_ids": []},
        {"format": 1, "highest_epoch": 1, "applied_version": 0, "off_vm_ids": [3]},
    ],
)
def test_well_formed_nonsense_is_damage(path: Path, body: object) -> None:
    path.write_text(json.dumps(body))
    assert StateFile(path).warning


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 10_000), st.integers(1, 255)), min_size=1, max_size=6))
def test_flipped_bits_never_raise(path: Path, flips: list[tuple[int, int]]) -> None:
    for leftover in path.parent.iterdir():
        leftover.unlink()
    StateFile(path).update(highest_epoch=1234, off_vm_ids=frozenset({"x"}))
    raw = bytearray(path.read_bytes())
    for place, bits in flips:
        raw[place % len(raw)] ^= bits
    path.write_bytes(raw)
    StateFile(path).update(applied_version=1)


def test_a_folder_that_cannot_be_written_is_an_error(path: Path) -> None:
    state = StateFile(path)
    path.with_suffix(".tmp").mkdir()
    with pytest.raises(StateError, match=r"cannot write .*state\.json"):
        state.update(highest_epoch=1)
    assert state.state.highest_epoch == 0
    os.rmdir(path.with_suffix(".tmp"))
    state.update(highest_epoch=1)
    assert StateFile(path).state.highest_epoch == 1
