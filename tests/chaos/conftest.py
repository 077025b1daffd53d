# SPDX-License-Identifier: Apache-2.0
"""Options of the chaos tests: how long the soak is, and the seed of its random moments."""

from __future__ import annotations

import random

import pytest

# Beyond the soak itself: booting, filling, draining and comparing, on a machine that does other things too.
AROUND_SECONDS = 300


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("frostline")
    group.addoption("--soak-seconds", type=int, default=60, help="length of the soak (60); its kills scale with it")
    group.addoption("--soak-seed", type=int, default=0, help="seed of the soak's random moments (0: a new one)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    limit = config.getoption("--soak-seconds") + AROUND_SECONDS
    for item in items:
        if item.get_closest_marker("soak") is not None:
            item.add_marker(pytest.mark.timeout(limit))


@pytest.fixture
def soak_seconds(pytestconfig: pytest.Config) -> int:
    return int(pytestconfig.getoption("--soak-seconds"))


@pytest.fixture
def seed(pytestconfig: pytest.Config) -> int:
    """Printed, so that a failing run can be told again."""
    return int(pytestconfig.getoption("--soak-seed")) or random.SystemRandom().randrange(1, 1 << 31)
