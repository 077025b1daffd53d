# SPDX-License-Identifier: Apache-2.0
"""What needs page_idle, inside a kernel that has it. Building that takes long: `make test-kernel-idle` does."""

from collections.abc import Iterator

import pytest

from .boot import KernelConfig
from .conftest import MEMORY_MIB
from .idle import kept_idle_kernel
from .kernels import Kernels
from .left_out import check_passed, must_say
from .test_c import LIMIT_SECONDS, TRACKERS
from .verdict import TRIES, run_test

# Those of the idle tracker, and those that go through every tracker there is.
NAMES = (
    "test_tracker_idle",
    "test_tracker_idle_guest",
    "test_tracker_idle_refuse",
    "test_tracker_exact",
    "test_tracker_underneath",
    "test_tracker_choice",
    "test_rwp_pitfalls",
    "test_evict_held",
)


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    built = kept_idle_kernel()
    if built is None:
        pytest.skip("no kernel with page_idle in the cache: make test-kernel-idle builds one, in some ten minutes")
    with Kernels(KernelConfig(memory_mib=MEMORY_MIB), tmp_path_factory, "idle", built) as kernels:
        yield kernels


@pytest.mark.timeout(TRIES * LIMIT_SECONDS + 60)
@pytest.mark.parametrize("name", NAMES)
def test_it_passes_with_page_idle(name: str, idle: Kernels, request: pytest.FixtureRequest) -> None:
    result = run_test(idle, name, LIMIT_SECONDS, request)
    check_passed(result, must_say(name, (*TRACKERS, "idle")), request)
