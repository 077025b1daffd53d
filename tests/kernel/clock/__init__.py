# SPDX-License-Identifier: Apache-2.0
"""The rate of this machine's time stamp counter, which is the guest's as well."""

from functools import cache
from pathlib import Path

from tests.system.guest.build import static_program
from tests.system.guest.tools import run_tool


@cache
def tsc_khz() -> int:
    """Measured once a run. See tsc.c for what it is needed for."""
    return int(run_tool([str(static_program("tsc", Path(__file__).resolve().parent, "kernel"))], 30))
