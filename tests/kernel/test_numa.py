# SPDX-License-Identifier: Apache-2.0
"""Trackers on a host of two NUMA nodes, where every page can be moved to the other one at once."""

from collections.abc import Iterator

import pytest

from .boot import KernelConfig
from .conftest import MEMORY_MIB
from .kernels import Kernels
from .left_out import check_passed, must_say
from .test_c import LIMIT_SECONDS, TRACKERS
from .verdict import TRIES, run_test


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    with Kernels(KernelConfig(memory_mib=MEMORY_MIB, nodes=2), tmp_path_factory, "numa") as kernels:
        yield kernels


@pytest.mark.timeout(TRIES * LIMIT_SECONDS + 60)
def test_hotness_stays_with_the_address_when_move_pages_moves_the_page(
    two_nodes: Kernels, request: pytest.FixtureRequest
) -> None:
    result = run_test(two_nodes, "test_tracker_underneath", LIMIT_SECONDS, request, {"FL_PART": "moved"})
    all_moved = [rf"{tracker:<5} 100 % of the pages were migrated at once, by move_pages\(\)" for tracker in TRACKERS]
    on_the_move = [rf"{tracker:<5} all pages were moved \d+ times in \d+ scans" for tracker in ("rwp", "zap")]
    check_passed(result, all_moved + on_the_move, request)


@pytest.mark.timeout(TRIES * LIMIT_SECONDS + 60)
def test_no_write_is_lost_to_an_eviction_while_the_page_is_being_moved(
    two_nodes: Kernels, request: pytest.FixtureRequest
) -> None:
    result = run_test(two_nodes, "test_evict_race", LIMIT_SECONDS, request)
    moved = [rf"{tracker}: all pages were moved \d{{2,}} times" for tracker in ("zap", "rwp")]
    check_passed(result, must_say("test_evict_race", TRACKERS) + moved, request)
