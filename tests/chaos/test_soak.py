# SPDX-License-Identifier: Apache-2.0
"""Writers over pages that come and go, while pagers and agents are killed at random moments: not one wrong byte."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any, Final

import pytest

from frostline.wire.units import format_size
from tests.chaos.killer import Killer, Takeovers, percentile, serves
from tests.conftest import why_no_guest
from tests.system.guest import Guest, GuestConfig, Workload
from tests.system.world import Timing, World, until

# 100 kills of the pager and 20 of the agent in ten minutes.
SECONDS_A_PAGER_KILL: Final = 6.0
SECONDS_AN_AGENT_KILL: Final = 30.0
TELL_SECONDS: Final = 30.0
TAKEOVER_TARGET_MS: Final = 200.0
# Starting any program takes a millisecond or two. On a machine so busy that it takes ten times as long, so does this.
TAKEOVER_STARTS: Final = 20.0
CONFIG: Final = GuestConfig(
    name="soak",
    memory_mib=512,
    workload=Workload(mib=400, hot_mib=8, rate=200, rewrite_percent=20, writers=2, writer_rate=400),
)
POLICY: Final[dict[str, Any]] = {
    "version": 1,
    "default_class": "soak",
    "classes": {"soak": {"mode": "enforce", "min_idle_age": "1s", "floor": "5%", "cap": "95%", "rate": "256MiB/s"}},
}
REPORT: Final = Path(__file__).resolve().parents[2] / "build" / "soak-report.json"


class FastTiming(Timing):
    scan = 0.5
    lease = 20.0


@pytest.mark.soak
def test_nothing_is_lost_in_the_soak(
    soak_seconds: int, seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reason = why_no_guest()
    if reason is not None:
        pytest.skip(reason)

    def tell(sentence: str) -> None:
        with capsys.disabled():
            print(f"\nsoak: {sentence}", end="", flush=True)

    tell(f"{soak_seconds} s with --soak-seed {seed}")
    with World(keep_logs_in=tmp_path, timing=FastTiming) as world:
        world.start_controller()
        world.put_policy(POLICY)
        guest = world.start_guest(CONFIG)
        guest.wait_filled()
        touched = guest.memfd_resident_bytes()
        # The writers keep most vCPUs waiting on purpose: the brake would do what it is for, and end the test.
        agent = world.start_agent([CONFIG], limits={"stall_target": "100%", "fault_threads": 2})
        until("most of it away", lambda: _away(world, guest) >= touched // 2, 60, world.words)

        killer = Killer(world, agent, guest, seed)
        pager_kills = max(1, round(soak_seconds / SECONDS_A_PAGER_KILL))
        agent_kills = max(1, round(soak_seconds / SECONDS_AN_AGENT_KILL))
        least_away, start_ms = _soak(world, guest, killer, soak_seconds, (pager_kills, agent_kills), tell)
        until("a living pager at the end", lambda: serves(guest), 30, world.words)

        result = killer.result
        assert not result.problems, f"{result.problems}\n{world.words()}"
        assert (result.pager_kills, result.agent_kills) == (pager_kills, agent_kills)
        assert guest.verify(180) == 0, guest.describe()
        status = world.status(guest)
        assert status is not None and status.checksum_errors == 0 and status.poisoned_pages == 0
        figures = _figures(seed, soak_seconds, result, least_away / touched)
        figures |= {"faults": status.faults, "evictions": status.evictions, "recovered_pages": status.recovered_pages}
        figures["program_start_median_ms"] = round(start_ms, 1)
        figures |= {"fault_p50_us": status.fault_percentile_ns(500) / 1e3, "writes": guest.status().writes}

        guest.command("writers 0")
        world.agent_cli(agent, "detach", CONFIG.name)
        until("the detach", lambda: not _attached(world, guest), 90, world.words)
        assert guest.verify(120) == 0, guest.describe()
        assert guest.wait_rounds(3, 30).errors == 0
        figures["errors"] = guest.status().errors

    REPORT.parent.mkdir(exist_ok=True)
    REPORT.write_text(json.dumps(figures, indent=2) + "\n")
    for name, value in figures.items():
        tell(f"  {name}: {value:,.1f}" if isinstance(value, float) else f"  {name}: {value}")
    tell("")
    assert status.faults >= 50 * soak_seconds and status.evictions >= 50 * soak_seconds, "too little happened"
    assert least_away > touched // 4, "most of the memory must have been away all the time"
    assert figures["takeover_median_ms"] < max(TAKEOVER_TARGET_MS, TAKEOVER_STARTS * start_ms), figures


def _soak(
    world: World, guest: Guest, killer: Killer, seconds: int, kills: tuple[int, int], tell: Any
) -> tuple[int, float]:
    """Let it run; gives the least that was away at any look, in bytes, and what starting a program took, in ms."""
    least_away = _away(world, guest)
    starts_ms: list[float] = []
    deadline = time.monotonic() + seconds
    next_told = time.monotonic() + TELL_SECONDS
    killer.start(seconds, *kills)
    try:
        while time.monotonic() < deadline and not killer.result.problems:
            time.sleep(0.5)
            assert guest.alive(), guest.describe()
            assert guest.status().errors == 0, guest.describe()
            starts_ms.append(_start_ms())
            away = killer.undisturbed(lambda: _away(world, guest))
            least_away = min(least_away, least_away if away is None else away)
            if time.monotonic() >= next_told:
                next_told += TELL_SECONDS
                result, checked = killer.result, guest.status().checked_pages
                tell(
                    f"{deadline - time.monotonic():4.0f} s left, {result.pager_kills} pagers and {result.agent_kills} "
                    f"agents killed, {format_size(_away(world, guest))} away, {checked:,} pages checked"
                )
        killer.join(60)
    finally:
        killer.stop()
    return least_away, percentile(starts_ms, 50)


def _start_ms() -> float:
    """How long it takes here and now to start a program and see it end, in ms."""
    started = time.perf_counter()
    subprocess.run(["true"], check=True, timeout=30)
    return (time.perf_counter() - started) * 1e3


def _figures(seed: int, seconds: int, result: Takeovers, least_share: float) -> dict[str, Any]:
    served = result.with_agent
    return {
        "seed": seed,
        "seconds": seconds,
        "pager_kills": result.pager_kills,
        "agent_kills": result.agent_kills,
        "takeover_median_ms": round(percentile(served, 50), 1),
        "takeover_p90_ms": round(percentile(served, 90), 1),
        "takeover_max_ms": round(max(served, default=0.0), 1),
        "pager_start_median_ms": round(percentile(result.pager_starts, 50), 1),
        "pager_start_max_ms": round(max(result.pager_starts, default=0.0), 1),
        "takeovers_over_target": sum(value >= TAKEOVER_TARGET_MS for value in served),
        "takeover_max_with_agent_dead_ms": round(max(result.without_agent, default=0.0), 1),
        "least_share_away": round(least_share, 3),
    }


def _away(world: World, guest: Guest) -> int:
    status = world.status(guest)
    return status.evicted_bytes if status is not None else 0


def _attached(world: World, guest: Guest) -> bool:
    world.forget_view(guest)
    status = world.status(guest)
    return status is not None and (status.pager_alive or status.evicted_pages > 0)
