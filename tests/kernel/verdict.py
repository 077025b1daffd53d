# SPDX-License-Identifier: Apache-2.0
"""Run a C test inside the kernel until there is a verdict.

QEMU's TCG with several threads now and then loses the state of a nested guest: it goes on with the host's CR3, at the
host's instruction behind VMRUN. A C test that can prove this (``kvm_guest.h``, KVM_GUEST_LOST) ends without a verdict.
Or a CPU stops for good, which is proven from outside (``stopped.py``), and another kernel is booted.
"""

from collections.abc import Callable, Mapping

import pytest

from tests.system.guest.errors import GuestError

from .boot import Kernel
from .left_out import PROPERTY
from .result import Result

NO_VERDICT = 75  # KVM_VMM_NO_VERDICT
TRIES = 3


def _why_no_verdict(kernel: Kernel, result: Result) -> str | None:
    if result.over_limit:
        return kernel.stopped()
    if result.code != NO_VERDICT:
        return None
    return next((line for line in result.stdout.splitlines() if line.startswith("no verdict:")), "it does not say why")


def run_test(
    kernels: Callable[[], Kernel],
    name: str,
    timeout: float,
    request: pytest.FixtureRequest,
    environment: Mapping[str, str] | None = None,
) -> Result:
    """The first of at most TRIES runs that has a verdict, or the last; that others had none is shown at the end."""
    for _ in range(TRIES - 1):
        kernel = kernels()
        try:
            result = kernel.run([f"/tests/{name}"], timeout, environment)
        except GuestError:
            why = kernel.stopped()
            if why is None:
                raise
        else:
            why = _why_no_verdict(kernel, result)
            if why is None:
                return result
        request.node.user_properties += [(PROPERTY, f"run again, {why}")]
    return kernels().run([f"/tests/{name}"], timeout, environment)
