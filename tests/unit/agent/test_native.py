# SPDX-License-Identifier: Apache-2.0
"""The binding: Python's types are those of frostline.h, and failures are exceptions that say what was tried."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from frostline.native import (
    AGE_BIN_EDGES,
    LATENCY_BUCKET_EDGES_NS,
    Command,
    CommandKind,
    Freeze,
    KernelFeatures,
    NativeError,
    Pager,
    Refusal,
    State,
    Tracker,
    View,
    Why,
    inspect,
    latency_percentile_ns,
    library_version,
    probe_kernel,
)
from frostline.native.binding import check, ffi, lib, text
from frostline.native.view import RECORD_FIELDS, STATUS_FIELDS
from frostline.v1 import common_pb2


def fields_of(struct: str) -> tuple[str, ...]:
    return tuple(name for name, _ in ffi.typeof(struct).fields)


def test_dataclasses_have_the_fields_of_their_structs_in_order() -> None:
    assert fields_of("struct fl_status") == STATUS_FIELDS
    assert fields_of("struct fl_record") == RECORD_FIELDS
    assert fields_of("struct fl_kernel_features") == tuple(KernelFeatures.__dataclass_fields__)
    assert fields_of("struct fl_command")[1:] == tuple(Command.__dataclass_fields__)


def test_words_are_those_of_the_library() -> None:
    assert all(text(lib.fl_refusal_name(refusal)) == refusal.word for refusal in Refusal)
    assert all(text(lib.fl_state_name(state)) == state.word for state in State)
    assert all(text(lib.fl_why_name(why)) == why.word for why in Why)


def test_refusals_have_the_numbers_of_the_wire() -> None:
    for refusal in Refusal:
        name = f"REFUSAL_{refusal.name}" if refusal else "REFUSAL_UNSPECIFIED"
        assert common_pb2.Refusal.Value(name) == int(refusal)


def test_trackers_and_freezes_have_the_words_of_the_library_and_the_numbers_of_the_wire() -> None:
    assert all(text(lib.fl_tracker_name(tracker)) == tracker.word for tracker in Tracker)
    assert all(text(lib.fl_freeze_name(freeze)) == freeze.word for freeze in Freeze)
    for enum, prefix, ours in (
        (common_pb2.Tracker.DESCRIPTOR, "TRACKER_", Tracker),
        (common_pb2.FreezeMethod.DESCRIPTOR, "FREEZE_METHOD_", Freeze),
    ):
        numbers = {
            value.name.removeprefix(prefix).replace("UNSPECIFIED", "NONE"): value.number for value in enum.values
        }
        assert numbers == {each.name: int(each) for each in ours}


def test_edges_rise() -> None:
    assert AGE_BIN_EDGES[0] == 0 and list(AGE_BIN_EDGES) == sorted(set(AGE_BIN_EDGES))
    assert list(LATENCY_BUCKET_EDGES_NS) == sorted(set(LATENCY_BUCKET_EDGES_NS))


def test_percentiles() -> None:
    buckets = [0] * 64
    assert latency_percentile_ns(buckets, 500) == 0
    buckets[10] = 99
    buckets[40] = 1
    assert latency_percentile_ns(buckets, 500) <= LATENCY_BUCKET_EDGES_NS[10]
    assert latency_percentile_ns(buckets, 1000) > LATENCY_BUCKET_EDGES_NS[30]


def test_return_codes_become_exceptions() -> None:
    assert check(3, "count") == 3
    with pytest.raises(NativeError, match="cannot open the door: Permission denied") as caught:
        check(-errno.EACCES, "cannot open the door")
    assert caught.value.errno == errno.EACCES


def test_a_refusal_of_a_newer_library_is_still_a_refusal() -> None:
    assert Refusal(4711) is Refusal.INTERNAL


@pytest.fixture
def sleeper() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process.pid
    process.kill()
    process.wait(10)


def test_inspecting_a_process_that_is_no_vmm_is_a_refusal_with_a_sentence(sleeper: int) -> None:
    found = inspect(sleeper)
    assert found.refusal is Refusal.NOT_SHARED_MEMFD and found.detail
    assert not found.has_vault and not found.served_by_pid


def test_inspecting_nobody_says_gone() -> None:
    process = subprocess.Popen(["true"])
    process.wait(10)
    assert inspect(process.pid).refusal is Refusal.GONE


def test_a_process_without_a_vault_has_no_view(sleeper: int) -> None:
    with pytest.raises(NativeError, match=f"cannot open the vault of process {sleeper}") as caught:
        View(sleeper)
    assert caught.value.errno == errno.ENOENT


def test_a_socket_without_a_pager_cannot_be_connected(tmp_path: object) -> None:
    with pytest.raises(NativeError, match="cannot connect to the pager at"):
        Pager(f"{tmp_path}/none.sock")
    assert Command(CommandKind.PING).budget_bytes == 0


def test_probing_and_version() -> None:
    assert library_version()[0].isdigit()
    assert isinstance(probe_kernel().pagemap_scan, bool)
    assert os.uname().sysname == "Linux"
