# SPDX-License-Identifier: Apache-2.0
"""Every C test, the pager's among them, inside a Linux 7.3 with nested KVM."""

from pathlib import Path

import pytest

from .boot import Kernel
from .kernels import Kernels
from .left_out import check_passed, must_say
from .result import SKIPPED
from .verdict import TRIES, run_test

_SOURCES = Path(__file__).resolve().parents[2] / "native" / "tests"
NAMES = sorted(path.stem for path in _SOURCES.glob("test_*.c"))
# An emulated CPU beside others on a busy machine; each takes less than a quarter of this on a quiet one.
LIMIT_SECONDS = 360.0
# What this kernel is booted for: these must run here, whatever else may have to be skipped.
MUST_RUN = frozenset(
    {
        "test_evict_held",
        "test_evict_race",
        "test_fault_waiters",
        "test_kvm_guest",
        "test_pager_kill",
        "test_probe_half",
        "test_rwp_anonymous",
        "test_rwp_given_up",
        "test_rwp_pitfalls",
        "test_scan_void",
        "test_sweep",
        "test_sync_left",
        "test_tracker_choice",
        "test_tracker_damon",
        "test_tracker_damon_host",
        "test_tracker_exact",
        "test_tracker_underneath",
    }
)
# Those that work in this kernel.
TRACKERS = ("rwp", "zap", "damon")


@pytest.mark.timeout(TRIES * LIMIT_SECONDS + 60)
@pytest.mark.parametrize("name", NAMES)
def test_it_passes_inside(name: str, kernels: Kernels, request: pytest.FixtureRequest) -> None:
    result = run_test(kernels, name, LIMIT_SECONDS, request)
    if result.code == SKIPPED and not result.over_limit and name not in MUST_RUN:
        assert result.stdout.strip(), "it is skipped, and does not say why"
        pytest.skip(result.stdout.strip().splitlines()[-1])
    check_passed(result, must_say(name, TRACKERS), request)


def test_this_kernel_has_what_it_is_booted_for(kernel: Kernel) -> None:
    """RWP, DAMON on virtual addresses, and a KVM that runs guests with nested paging."""
    shown = kernel.shell("cat /sys/module/kvm_amd/parameters/npt; ls /sys/kernel/mm/damon/admin/kdamonds; ls /dev/kvm")
    assert shown.split()[0] in ("Y", "1")
    assert "nr_kdamonds" in shown and "/dev/kvm" in shown
