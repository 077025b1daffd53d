# SPDX-License-Identifier: Apache-2.0
"""Trackers on a host of two NUMA nodes, where every page can be moved to the other one at once."""

from pathlib import Path

import pytest

from tests.conftest import why_no_guest

from .boot import Kernel, KernelConfig
from .conftest import MEMORY_MIB
from .left_out import check_passed, must_say
from .test_c import LIMIT_SECONDS, TRACKERS
from .verdict import TRIES, run_test


@pytest.mark.timeout(TRIES * LIMIT_SECONDS + 60)
def test_hotness_stays_with_the_address_when_move_pages_moves_the_page(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reason = why_no_guest()
    if reason is not None:
        pytest.skip(reason)
    with Kernel(KernelConfig(memory_mib=MEMORY_MIB, nodes=2), tmp_path) as kernel:
        result = run_test(kernel, "test_tracker_underneath", LIMIT_SECONDS, request)
    all_moved = [rf"{tracker:<5} 100 % of the pages were migrated at once, by move_pages\(\)" for tracker in TRACKERS]
    on_the_move = [rf"{tracker:<5} all pages were moved \d+ times in \d+ scans" for tracker in ("rwp", "zap")]
    check_passed(result, must_say("test_tracker_underneath", TRACKERS) + all_moved + on_the_move, request)
