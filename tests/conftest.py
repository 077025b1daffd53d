# SPDX-License-Identifier: Apache-2.0
"""Fixtures that boot virtual machines, for system and chaos tests alike."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

from tests.system.guest import Guest, GuestConfig

# Whether an example is slow is up to the machine; pytest's own limit ends what hangs.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

GuestFactory = Callable[[GuestConfig], Guest]


def why_no_guest() -> str | None:
    """Why this machine can run no test guest; None: it can."""
    if os.geteuid() != 0:
        return "a test guest needs root: it is run as others, and its memory is looked into"
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("gcc", "gcc"), ("setpriv", "util-linux")):
        if shutil.which(program) is None:
            return f"{program} is not there: install {package}"
    return None


@pytest.fixture
def guest_factory(tmp_path: Path) -> Iterator[GuestFactory]:
    """Starts guests (not waited for), each with its own folder for logs, and ends them all with the test."""
    reason = why_no_guest()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as guests:
        started = 0

        def start(config: GuestConfig) -> Guest:
            nonlocal started
            started += 1
            return guests.enter_context(Guest(config, tmp_path / f"guest-{started}-{config.name}"))

        yield start
