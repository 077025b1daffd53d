# SPDX-License-Identifier: Apache-2.0
"""The choice among trackers: how it is written, and what follows from it."""

from __future__ import annotations

import pytest

from frostline.agent import trackers
from frostline.agent.settings import AgentSettings
from frostline.agent.trackers import KNOWN, freeze_for, parse_trackers, preferred, trackers_text, why_preferred
from frostline.native import Freeze, NativeError, Tracker, TrackerProbe


def probes(*possible: Tracker) -> list[TrackerProbe]:
    return [TrackerProbe(tracker, tracker in possible, "") for tracker in KNOWN]


def test_a_list_is_read_as_it_is_written() -> None:
    assert parse_trackers("auto") == parse_trackers(["auto"]) == ()
    assert parse_trackers("rwp, zap") == parse_trackers(["rwp", "zap"]) == (Tracker.RWP, Tracker.ZAP)
    for chosen in ((), (Tracker.DAMON,), tuple(reversed(KNOWN))):
        assert parse_trackers(trackers_text(chosen)) == chosen


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("", "the list is empty"),
        (" , ", "the list is empty"),
        ([], "the list is empty"),
        ("rwp,", "'' is no tracker"),
        ("RWP", "'RWP' is no tracker; there are rwp, zap, idle, damon, or auto"),
        ("auto,rwp", "auto stands alone"),
        (["zap", "zap"], "'zap' is in the list twice"),
        ([1], "1 is no tracker"),
        ([True], "True is no tracker"),
        ({"zap": 1}, "is no list of trackers"),
        (None, "None is no list of trackers"),
    ],
)
def test_a_bad_list_is_refused_with_what_is_wrong_in_it(value: object, says: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        parse_trackers(value)
    assert says in str(caught.value)


def test_the_setting_comes_from_the_command_line_then_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert AgentSettings().trackers is None
    monkeypatch.setenv("FROSTLINE_AGENT_TRACKERS", "zap,damon")
    assert AgentSettings().trackers == (Tracker.ZAP, Tracker.DAMON)
    assert AgentSettings(trackers="idle").trackers == (Tracker.IDLE,)  # type: ignore[arg-type]


def test_the_first_that_is_wanted_and_possible_is_taken() -> None:
    here = probes(Tracker.ZAP, Tracker.DAMON)
    assert preferred((), here) is Tracker.ZAP
    assert preferred((Tracker.RWP, Tracker.DAMON, Tracker.ZAP), here) is Tracker.DAMON
    assert preferred((), probes()) is preferred((Tracker.RWP,), probes()) is Tracker.NONE


def test_a_list_of_which_nothing_is_possible_is_kept_to_and_says_what_would_be() -> None:
    here = probes(Tracker.RWP, Tracker.DAMON)
    assert preferred((Tracker.ZAP,), here) is Tracker.NONE
    said = why_preferred((Tracker.ZAP,), here)
    assert said.startswith("none of zap is possible here, so nothing") and "rwp, damon would be" in said
    assert "nor any other" in why_preferred((Tracker.ZAP,), probes())


def test_a_host_says_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "probe_trackers", lambda: probes(Tracker.RWP, Tracker.IDLE))
    assert trackers.capabilities() == ("tracker.rwp", "tracker.idle", "freeze.rwp", "freeze.wp")

    def broken() -> list[TrackerProbe]:
        raise NativeError(38, "cannot probe the kernel")

    monkeypatch.setattr(trackers, "probe_trackers", broken)
    assert trackers.capabilities() == ()


def test_only_rwp_freezes_by_rwp() -> None:
    assert [tracker for tracker in KNOWN if freeze_for(tracker) is Freeze.RWP] == [Tracker.RWP]
