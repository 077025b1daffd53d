# SPDX-License-Identifier: Apache-2.0
"""Running the operating system's tools: apt, dpkg, the compiler, what makes file systems."""

import os
import subprocess
from pathlib import Path

from .errors import GuestError


def run_tool(command: list[str], limit_seconds: int, folder: Path | None = None) -> str:
    """Run one and return what it wrote. GuestError with its own words when it fails, is too slow or is not there."""
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except FileNotFoundError as error:
        raise GuestError(f"{command[0]} is not there; this needs Debian 12 or 13, and `make deps`") from error
    except subprocess.TimeoutExpired as error:
        slow = "; is the package mirror up?" if command[0].startswith("apt") else ""
        raise GuestError(f"{' '.join(command)}: not done after {limit_seconds} s{slow}") from error
    if done.returncode != 0:
        raise GuestError(f"{' '.join(command)}: exit {done.returncode}: {done.stderr.strip()[-1000:]}")
    return done.stdout
