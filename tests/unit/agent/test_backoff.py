# SPDX-License-Identifier: Apache-2.0
"""How long the agent waits before it tries again."""

from __future__ import annotations

import random

import pytest

from frostline.agent.backoff import DialBackoff, RestartBackoff


def test_dialling_grows_by_the_factor_to_the_limit_with_jitter() -> None:
    backoff = DialBackoff(random.Random(1))
    step = 1.0
    for _ in range(30):
        wait = backoff.wait_seconds()
        assert 0.8 * step <= wait <= 1.2 * step
        step = min(step * 1.6, 120.0)
    assert step == 120.0


def test_the_first_wait_after_a_session_is_spread_over_the_whole_step() -> None:
    waits = []
    for seed in range(200):
        backoff = DialBackoff(random.Random(seed))
        for _ in range(5):
            backoff.wait_seconds()
        backoff.connected()
        waits.append(backoff.wait_seconds())
    assert min(waits) < 0.1 and 0.9 < max(waits) <= 1.0
    backoff = DialBackoff(random.Random(1))
    backoff.connected()
    backoff.wait_seconds()
    assert backoff.wait_seconds() >= 0.8 * 1.6


@pytest.mark.parametrize("asked", [5.0, 30.0])
def test_what_the_controller_asks_for_is_the_least(asked: float) -> None:
    for seed in range(50):
        assert asked <= DialBackoff(random.Random(seed)).wait_seconds(asked) <= asked * 1.2


def test_a_mad_wish_is_capped() -> None:
    assert DialBackoff(random.Random(1)).wait_seconds(1e9) <= 144.0
    assert DialBackoff(random.Random(1)).wait_seconds(-5.0) <= 1.2


def test_the_first_restart_is_immediate_and_only_repeated_failures_wait() -> None:
    backoff = RestartBackoff()
    waits = [backoff.wait_seconds(0.1) for _ in range(12)]
    assert waits[0] == 0.0 and waits[1] == pytest.approx(0.05)
    assert waits == sorted(waits) and waits[-1] == 1.0
    assert backoff.wait_seconds(60.0) == 0.0 and backoff.failures == 0
    assert backoff.wait_seconds(0.1) == 0.0


def test_where_nobody_waits_the_limit_is_higher_and_nothing_overflows() -> None:
    backoff = RestartBackoff()
    waits = [backoff.wait_seconds(0.0, 30.0) for _ in range(2000)]
    assert waits[-1] == 30.0
