# SPDX-License-Identifier: Apache-2.0
"""Real Linux guests for tests, demo and soak: see guest.Guest, and `python -m tests.system.guest`."""

from .config import GuestConfig, Workload
from .console import Status
from .errors import GuestError
from .guest import Guest, PagePlace

__all__ = ["Guest", "GuestConfig", "GuestError", "PagePlace", "Status", "Workload"]
