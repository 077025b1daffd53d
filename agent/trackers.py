# SPDX-License-Identifier: Apache-2.0
"""Which trackers pagers may use, in order of preference: how that is written down, and what follows from it here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from frostline.native import Freeze, NativeError, Tracker, TrackerProbe, probe_trackers

AUTO: Final = "auto"
KNOWN: Final[tuple[Tracker, ...]] = tuple(tracker for tracker in Tracker if tracker is not Tracker.NONE)
_WORDS: Final = ", ".join(tracker.word for tracker in KNOWN)


def parse_trackers(value: object) -> tuple[Tracker, ...]:
    """``auto`` (an empty tuple: all there are, in the pager's own order), ``rwp,zap`` or a list of names.

    Raises ValueError that names what is unknown, doubled or empty.
    """
    if isinstance(value, str):
        names: list[object] = [part.strip() for part in value.split(",")]
    elif isinstance(value, (list, tuple)):
        names = list(value)
    else:
        raise ValueError(f"{value!r} is no list of trackers; give {AUTO}, or some of {_WORDS}")
    if names == [AUTO]:
        return ()
    if not any(names):
        raise ValueError(f"the list is empty; give {AUTO}, or some of {_WORDS} in order of preference")
    chosen: list[Tracker] = []
    for name in names:
        tracker = next((each for each in KNOWN if name is each or name == each.word), None)
        if tracker is None:
            hint = f"{AUTO} stands alone" if name == AUTO else f"there are {_WORDS}, or {AUTO}"
            raise ValueError(f"{name!r} is no tracker; {hint}")
        if tracker in chosen:
            raise ValueError(f"{name!r} is in the list twice")
        chosen.append(tracker)
    return tuple(chosen)


def trackers_text(trackers: Iterable[Tracker]) -> str:
    """As ``parse_trackers`` and the pager's ``--trackers`` read it."""
    return ",".join(tracker.word for tracker in trackers) or AUTO


def preferred(wanted: tuple[Tracker, ...], probes: Iterable[TrackerProbe]) -> Tracker:
    """The tracker that a new pager takes: the first that is wanted and possible; ``Tracker.NONE`` if there is none."""
    possible = [probe.tracker for probe in probes if probe.possible]
    return next((each for each in wanted or possible if each in possible), Tracker.NONE)


def freeze_for(tracker: Tracker) -> Freeze:
    """How a new pager registers memory for a tracker; write-protection is what all but one of them go with."""
    return Freeze.RWP if tracker is Tracker.RWP else Freeze.WP


def why_preferred(wanted: tuple[Tracker, ...], probes: Iterable[TrackerProbe]) -> str:
    """A sentence for what ``preferred`` says."""
    probes = list(probes)
    asked = trackers_text(wanted or (probe.tracker for probe in probes))
    if preferred(wanted, probes) is Tracker.NONE:
        others = [probe.tracker.word for probe in probes if probe.possible]
        instead = f"; {', '.join(others)} would be: put it in the list" if others else ", nor any other"
        return f"none of {asked} is possible here, so nothing would be evicted{instead}"
    return f"the first of {asked} that is possible here"


def capabilities() -> tuple[str, ...]:
    """What this host has, for the controller: ``tracker.zap``, ``freeze.wp``, ...; nothing if it cannot be probed."""
    try:
        possible = [probe.tracker for probe in probe_trackers() if probe.possible]
    except NativeError:
        return ()
    freezes = sorted({freeze_for(tracker).word for tracker in possible})
    return (*(f"tracker.{tracker.word}" for tracker in possible), *(f"freeze.{word}" for word in freezes))
