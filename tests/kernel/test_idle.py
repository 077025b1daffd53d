# SPDX-License-Identifier: Apache-2.0
"""What needs page_idle, inside a kernel that has it. Building that takes long: `make test-kernel-idle` does."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from .boot import KernelConfig
from .conftest import MEMORY_MIB
from .idle import kept_idle_kernel
from .kernels import Kernels
from .left_out import check_passed, must_say
from .test_c import LIMIT_SECONDS, TRACKERS
from .verdict import TRIES, run_test

# Those of the idle tracker (but for one, below), and those that go through every tracker there is.
NAMES = (
    "test_tracker_idle_guest",
    "test_tracker_idle_refuse",
    "test_tracker_exact",
    "test_tracker_underneath",
    "test_tracker_choice",
    "test_rwp_given_up",
    "test_rwp_pitfalls",
    "test_evict_held",
)


# QEMU puts the initramfs at the end of memory, but not above 2 GiB. With so much, the last frames, of which page_idle's
# bitmap has a part of a word, are free once it has been unpacked. With more, the kernel keeps them for itself.
ALL_FRAMES_MIB = 2048


@contextmanager
def _kernels(tmp_path_factory: pytest.TempPathFactory, memory_mib: int) -> Iterator[Kernels]:
    built = kept_idle_kernel()
    if built is None:
        pytest.skip("no kernel with page_idle in the cache: make test-kernel-idle builds one, in some ten minutes")
    with Kernels(KernelConfig(memory_mib=memory_mib), tmp_path_factory, "idle", built) as kernels:
        yield kernels


@pytest.fixture(scope="module")
def idle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    with _kernels(tmp_path_factory, MEMORY_MIB) as kernels:
        yield kernels


def _check(kernels: Kernels, name: str, request: pytest.FixtureRequest) -> None:
    result = run_test(kernels, name, LIMIT_SECONDS, request)
    check_passed(result, must_say(name, (*TRACKERS, "idle")), request)


@pytest.mark.timeout(TRIES * LIMIT_SECONDS + 60)
@pytest.mark.parametrize("name", ["test_tracker_idle"])
def test_it_passes_where_the_last_frames_are_free(
    name: str, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> None:
    """First of all here: so that its kernel is gone when the other one boots."""
    with _kernels(tmp_path_factory, ALL_FRAMES_MIB) as kernels:
        _check(kernels, name, request)


@pytest.mark.timeout(TRIES * LIMIT_SECONDS + 60)
@pytest.mark.parametrize("name", NAMES)
def test_it_passes_with_page_idle(name: str, idle: Kernels, request: pytest.FixtureRequest) -> None:
    _check(idle, name, request)
