# SPDX-License-Identifier: Apache-2.0
"""Run a C test inside the kernel until there is a verdict.

QEMU's TCG with several threads now and then loses the state of a nested guest: it goes on with the host's CR3, at the
host's instruction behind VMRUN. A C test that can prove this (``kvm_guest.h``, KVM_GUEST_LOST) ends without a verdict.
"""

from collections.abc import Mapping

import pytest

from .boot import Kernel
from .left_out import PROPERTY
from .result import Result

NO_VERDICT = 75  # KVM_VMM_NO_VERDICT
TRIES = 3


def run_test(
    kernel: Kernel,
    name: str,
    timeout: float,
    request: pytest.FixtureRequest,
    environment: Mapping[str, str] | None = None,
) -> Result:
    """The first of at most TRIES runs that has a verdict, or the last; that others had none is shown at the end."""
    for _ in range(TRIES - 1):
        result = kernel.run([f"/tests/{name}"], timeout, environment)
        if result.code != NO_VERDICT or result.over_limit:
            return result
        why = next(
            (line for line in result.stdout.splitlines() if line.startswith("no verdict:")), "it does not say why"
        )
        request.node.user_properties += [(PROPERTY, f"run again, {why}")]
    return kernel.run([f"/tests/{name}"], timeout, environment)
