# SPDX-License-Identifier: Apache-2.0
"""Kills pagers and agents of a world at random moments, and measures how long nobody served."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from frostline.native import NativeError, State, View
from tests.system.daemons import AgentDaemon
from tests.system.guest import Guest
from tests.system.world import World, kill_pid

POLL_SECONDS: Final = 0.002
# systemd's Restart=always with its default RestartSec.
RESTART_SECONDS: Final = 0.1
SERVE_SECONDS: Final = 30.0


@dataclass
class Takeovers:
    """From the kill to the moment when the next pager served, in ms."""

    with_agent: list[float] = field(default_factory=list)
    without_agent: list[float] = field(default_factory=list)  # the agent was dead as well
    pager_starts: list[float] = field(default_factory=list)  # the pager's own part: from its first instruction on
    pager_kills: int = 0
    agent_kills: int = 0
    problems: list[str] = field(default_factory=list)


class Killer:
    """Two threads: one kills the guest's pager, one kills the agent and starts it again as systemd would."""

    def __init__(self, world: World, agent: AgentDaemon, guest: Guest, seed: int) -> None:
        self.result: Final = Takeovers()
        self._world: Final = world
        self._agent: Final = agent
        self._guest: Final = guest
        self._random: Final = random.Random(seed)
        self._stop: Final = threading.Event()
        self._agent_up: Final = threading.Event()
        self._agent_up.set()
        self._serving: Final = threading.Event()
        self._serving.set()
        self._threads: list[threading.Thread] = []

    def start(self, seconds: float, pager_kills: int, agent_kills: int) -> None:
        """So many kills, at moments drawn beforehand over the whole time."""
        started = time.monotonic()
        plans = {
            "kill-pager": (self._kill_pagers, self._moments(started, seconds, pager_kills)),
            "kill-agent": (self._kill_agents, self._moments(started, seconds, agent_kills)),
        }
        for name, (work, moments) in plans.items():
            thread = threading.Thread(target=self._guarded, args=(work, moments), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    def join(self, seconds: float) -> bool:
        """Whether all kills are done."""
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def undisturbed(self, look: Callable[[], int]) -> int | None:
        """What ``look`` gives while no kill is under way; None when one came in between: a successor counts anew."""
        kills = self.result.pager_kills
        if not self._serving.is_set():
            return None
        seen = look()
        return seen if self._serving.is_set() and self.result.pager_kills == kills else None

    def stop(self) -> None:
        self._stop.set()
        self.join(SERVE_SECONDS + 30)

    def _moments(self, started: float, seconds: float, count: int) -> list[float]:
        return sorted(started + self._random.uniform(0.0, seconds) for _ in range(count))

    def _guarded(self, work: Callable[[list[float]], None], moments: list[float]) -> None:
        try:
            work(moments)
        except Exception as error:
            self.result.problems.append(f"{threading.current_thread().name}: {error!r}")

    def _kill_pagers(self, moments: list[float]) -> None:
        with View(self._guest.pid) as view:
            for moment in moments:
                if self._stop.wait(max(0.0, moment - time.monotonic())):
                    return
                self._kill_pager(view)

    def _kill_pager(self, view: View) -> None:
        """Kill the one that is there, in whatever it is doing; then wait for its successor to serve."""
        deadline = time.monotonic() + SERVE_SECONDS
        self._serving.clear()
        while (pager := self._agent.pagers().get(self._guest.pid)) is None or not kill_pid(pager):
            if time.monotonic() > deadline:
                raise TimeoutError(f"no pager to kill in {SERVE_SECONDS:g} s")
            time.sleep(POLL_SECONDS)
        killed_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        agent_was_up = self._agent_up.is_set()
        self.result.pager_kills += 1
        while True:
            status = view.status()
            served_ns = status.pager_started_ns + status.takeover_ns
            if status.pager_alive and status.state is not State.STARTING and served_ns > killed_ns:
                break
            if time.monotonic() > deadline:
                raise TimeoutError(f"no pager serves {SERVE_SECONDS:g} s after kill {self.result.pager_kills}")
            agent_was_up = agent_was_up and self._agent_up.is_set()
            time.sleep(POLL_SECONDS)
        self._serving.set()
        into = self.result.with_agent if agent_was_up else self.result.without_agent
        into.append((served_ns - killed_ns) / 1e6)
        self.result.pager_starts.append(status.takeover_ns / 1e6)

    def _kill_agents(self, moments: list[float]) -> None:
        for moment in moments:
            if self._stop.wait(max(0.0, moment - time.monotonic())):
                return
            self._agent_up.clear()
            self._agent.kill()
            self.result.agent_kills += 1
            time.sleep(RESTART_SECONDS)
            self._agent.start()
            self._agent_up.set()


def percentile(values: list[float], percent: float) -> float:
    """The smallest value that so many percent do not exceed; 0 for none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] if ordered else 0.0


def serves(guest: Guest) -> bool:
    """Whether a living pager serves the guest now."""
    try:
        with View(guest.pid) as view:
            status = view.status()
    except NativeError:
        return False
    return status.pager_alive and status.state is not State.STARTING
