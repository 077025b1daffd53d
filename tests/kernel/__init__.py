# SPDX-License-Identifier: Apache-2.0
"""A Linux 7.3 in seconds: what is under test runs inside a kernel that has what this machine's own may lack.

See boot.Kernel, and `python -m tests.kernel --help`.
"""

from tests.system.guest.errors import GuestError

from .boot import Kernel, KernelConfig
from .result import Result

__all__ = ["GuestError", "Kernel", "KernelConfig", "Result"]
