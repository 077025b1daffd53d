# SPDX-License-Identifier: Apache-2.0
"""One booted Linux 7.3 for all tests here; another one if a test breaks it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import why_no_guest

from .boot import Kernel, KernelConfig
from .left_out import PROPERTY

MEMORY_MIB = 2560
KernelFactory = Callable[[], Kernel]


@pytest.fixture(scope="session")
def kernel_factory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[KernelFactory]:
    """Gives the booted kernel. One that has panicked, warned or hung is not used again."""
    reason = why_no_guest()
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as kernels:
        booted: list[Kernel] = []

        def give() -> Kernel:
            if not booted or booted[-1].broken() is not None:
                folder: Path = tmp_path_factory.mktemp("kernel")
                booted.append(kernels.enter_context(Kernel(KernelConfig(memory_mib=MEMORY_MIB), folder)))
            return booted[-1]

        yield give


@pytest.fixture
def kernel(kernel_factory: KernelFactory) -> Kernel:
    """A Linux 7.3, booted and in order."""
    return kernel_factory()


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
