# SPDX-License-Identifier: Apache-2.0
"""Who says what pagers to come take: the command line, else the running agent, else what one would be started with."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from frostline.agent import wanted as asking
from frostline.agent.admin import AdminRequest, AdminServer
from frostline.agent.authority import Authority
from frostline.agent.host import Host
from frostline.agent.limits import LimitsError, parse_limits
from frostline.agent.settings import AgentSettings
from frostline.agent.status import status_document
from frostline.agent.wanted import Wanted, wanted_here
from frostline.native import Tracker

RWP, ZAP, IDLE = (Tracker.RWP,), (Tracker.ZAP,), (Tracker.IDLE,)


@pytest.fixture
def settings() -> Iterator[AgentSettings]:
    """Of somebody whose limits file is not the agent's."""
    # Unix sockets do not fit below pytest's long folder names.
    with tempfile.TemporaryDirectory(prefix="fl-wanted-") as folder:
        limits = Path(folder, "limits.yaml")
        limits.write_text("version: 1\nscan_interval: 9s\ntrackers: [rwp]\n")
        yield AgentSettings(run_dir=Path(folder), limits=limits)


def tells(trackers: tuple[Tracker, ...], limits: str = "version: 1\nscan_interval: 2s\n") -> dict[str, Any]:
    """What an agent says of itself that starts its pagers with ``trackers``."""
    authority = SimpleNamespace(
        highest_epoch=0, applied_version=0, pool_full=False, limits=parse_limits(limits, "limits.yaml")
    )
    return status_document(AgentSettings(), trackers, cast(Host, []), cast(Authority, authority), None)


@contextlib.asynccontextmanager
async def agent(settings: AgentSettings, says: dict[str, Any], after_seconds: float = 0.0) -> AsyncIterator[None]:
    async def answer(_request: AdminRequest) -> dict[str, Any]:
        await asyncio.sleep(after_seconds)
        return says

    server = AdminServer(settings.admin_path, answer)
    await server.start()
    yield
    await server.stop()


async def here(settings: AgentSettings, *, trackers_given: bool = False, limits_given: bool = False) -> Wanted:
    return await wanted_here(settings, trackers_given=trackers_given, limits_given=limits_given)


async def test_a_running_agent_decides_whatever_the_settings_here_say(settings: AgentSettings) -> None:
    async with agent(settings, tells(ZAP)):
        heard = Wanted(ZAP, 2.0, f"the running agent ({settings.admin_path})", by_agent=True)
        assert await here(settings) == heard
        # As of somebody who has FROSTLINE_AGENT_TRACKERS in the environment.
        assert await here(settings.model_copy(update={"trackers": IDLE})) == heard
    async with agent(settings, tells((), "version: 1\n")):
        found = await here(settings)
        assert (found.trackers, found.scan_interval_seconds, found.by_agent) == ((), 0.0, True)


async def test_what_the_command_line_gives_is_a_what_if(settings: AgentSettings) -> None:
    given = settings.model_copy(update={"trackers": IDLE})
    async with agent(settings, tells(ZAP)):
        assert await here(given, trackers_given=True) == Wanted(IDLE, 2.0, "--trackers")
        assert await here(settings, limits_given=True) == Wanted(RWP, 9.0, str(settings.limits))
        assert await here(given, trackers_given=True, limits_given=True) == Wanted(IDLE, 9.0, "--trackers")


async def test_without_an_agent_it_is_what_one_would_be_started_with(settings: AgentSettings) -> None:
    nobody = f"; no agent says otherwise: cannot reach an agent on {settings.admin_path}: No such file or directory"
    found = await here(settings)
    assert found.trackers == RWP and found.scan_interval_seconds == 9.0 and not found.by_agent
    assert found.source.startswith(f"{settings.limits}{nobody}"), found.source
    found = await here(settings.model_copy(update={"trackers": IDLE}))
    assert found.trackers == IDLE and found.source.startswith(f"FROSTLINE_AGENT_TRACKERS{nobody}")
    assert settings.limits is not None
    settings.limits.write_text("version: 1\n")
    found = await here(settings)
    assert found.trackers == () and found.source.startswith(f"the built-in default{nobody}")
    settings.limits.write_text("version: 2\n")
    with pytest.raises(LimitsError, match="version"):
        await here(settings)


async def test_an_agent_that_is_not_understood_is_said_and_no_error(
    settings: AgentSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ASK_SECONDS", 0.2)
    other = f"the agent on {settings.admin_path} is of a version that does not tell its trackers; restart it"
    new = {"agent": {"trackers": "sixth-sense", "scan_interval_seconds": None}}
    for says, after_seconds, why in (
        (tells(ZAP), 0.6, f"no answer on {settings.admin_path} within 0.2 s"),
        ({"agent": {}}, 0.0, other),
        (new, 0.0, "'sixth-sense' is no tracker; there are rwp, zap"),
    ):
        async with agent(settings, says, after_seconds):
            found = await here(settings)
        assert found.trackers == RWP and not found.by_agent
        assert f"{settings.limits}; no agent says otherwise: {why}" in found.source, found.source
