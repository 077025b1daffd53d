# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several of the agent's tests use."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.agent.cgroups import FakeHost


@pytest.fixture
def fake_host(tmp_path: Path) -> FakeHost:
    return FakeHost(tmp_path)
