# SPDX-License-Identifier: Apache-2.0
"""One booted Linux 7.3 for all tests here; another one if a test breaks it."""

from collections.abc import Iterator

import pytest

from .boot import Kernel, KernelConfig
from .kernels import Kernels
from .left_out import PROPERTY

MEMORY_MIB = 2560


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kernels]:
    """Gives the booted kernel."""
    with Kernels(KernelConfig(memory_mib=MEMORY_MIB), tmp_path_factory, "kernel") as kernels:
        yield kernels


@pytest.fixture
def kernel(kernels: Kernels) -> Kernel:
    """A Linux 7.3, booted and in order."""
    return kernels()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests that passed have left out: they are no failures, and whoever ran them shall know."""
    lines = [
        f"{report.nodeid}: {line}"
        for report in terminalreporter.getreports("passed")
        for name, line in report.user_properties
        if name == PROPERTY and report.when == "call"
    ]
    if lines:
        terminalreporter.section("left out by tests that passed")
        for line in lines:
            terminalreporter.write_line(line)
