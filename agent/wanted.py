# SPDX-License-Identifier: Apache-2.0
"""What pagers to come are asked for on this host, and by whom: `probe` says what follows from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from frostline.agent.admin import AdminError, AdminRequest, ask
from frostline.agent.limits import load_limits
from frostline.agent.settings import ENVIRONMENT_PREFIX, AgentSettings
from frostline.agent.trackers import parse_trackers
from frostline.native import Tracker

ASK_SECONDS: Final = 3.0


@dataclass(frozen=True, slots=True)
class Wanted:
    """``trackers``: see ``parse_trackers``. ``scan_interval_seconds`` 0: the pagers' own."""

    trackers: tuple[Tracker, ...] = ()
    scan_interval_seconds: float = 0.0
    source: str = "the built-in default"  # of the trackers
    by_agent: bool = False  # the trackers are those of an agent that runs, so they are what a new pager is given


async def wanted_here(settings: AgentSettings, *, trackers_given: bool, limits_given: bool) -> Wanted:
    """What the command line says (a what-if), else the running agent, else what one would be started with.

    ``given``: on the command line, so in ``settings`` too. Raises LimitsError.
    """
    if limits_given:
        found = _to_come(settings)
    else:
        try:
            found = await _of_agent(settings.admin_path)
        except (AdminError, ValueError) as error:
            found = _to_come(settings)
            found = replace(found, source=f"{found.source}; no agent says otherwise: {error}")
    if trackers_given:
        found = replace(found, trackers=settings.trackers or (), source="--trackers", by_agent=False)
    return found


async def _of_agent(path: Path) -> Wanted:
    """Raises AdminError, or ValueError for an answer that this program does not understand."""
    said = (await ask(path, AdminRequest(method="status"), ASK_SECONDS))["agent"]
    if "trackers" not in said:
        raise ValueError(f"the agent on {path} is of a version that does not tell its trackers; restart it")
    return Wanted(
        parse_trackers(said["trackers"]),
        said["scan_interval_seconds"] or 0.0,
        f"the running agent ({path})",
        by_agent=True,
    )


def _to_come(settings: AgentSettings) -> Wanted:
    """Of an agent that would be started with these settings. Raises LimitsError."""
    limits = load_limits(settings.limits)
    interval = limits.document.scan_interval or 0.0
    if settings.trackers is not None:
        return Wanted(settings.trackers, interval, f"{ENVIRONMENT_PREFIX}TRACKERS")
    if limits.document.trackers is not None:
        return Wanted(limits.document.trackers, interval, limits.source)
    return Wanted((), interval)
