# SPDX-License-Identifier: Apache-2.0
"""What C tests must have tried inside the kernel, and what they say that they did not.

A test that leaves half of itself out passes all the same.
"""

import re
from collections.abc import Iterable, Sequence

import pytest

from .result import Result

_LEFT_OUT = re.compile(r"\bnot (?:tried|tested)\b|\bskipped:")
PROPERTY = "left out"


def left_out(result: Result) -> list[str]:
    """Lines of a test's output that name a part which it did not try."""
    return [" ".join(line.split()) for line in result.stdout.splitlines() if _LEFT_OUT.search(line)]


def silent(result: Result, said: Iterable[str]) -> list[str]:
    """Those of the patterns that no line of the test's output begins with."""
    return [pattern for pattern in said if not re.search(f"^{pattern}", result.stdout, re.MULTILINE)]


def check_passed(result: Result, said: Iterable[str], request: pytest.FixtureRequest) -> None:
    """The test has passed, and for each pattern in ``said`` there is a line that begins so.

    What it left out is kept for pytest's summary.
    """
    assert result.code == 0 and not result.over_limit, result.describe()
    unsaid = silent(result, said)
    assert not unsaid, f"passed, but does not say: {unsaid}\n{result.describe()}"
    request.node.user_properties += [(PROPERTY, line) for line in left_out(result)]


def must_say(name: str, trackers: Sequence[str]) -> list[str]:
    """Patterns of the lines by which a C test says that it tried a part, where these trackers work."""
    seen_io = [tracker for tracker in trackers if tracker in ("rwp", "zap")]
    each = {
        "test_tracker_underneath": [
            r"(?:[5-9]|\d\d+) % of the pages were migrated at once",
            r"up to \d{3,} pages were in the host's swap",
            r"\d{3,} pages stayed in the host's swap while others were evicted",
            r"[1-4] huge pages made",
            r"[1-4] huge pages split",
        ],
        "test_tracker_exact": [r"touched by the VMM alone: \d{4,} pages", r"took \d+ s"],
        "test_evict_held": [
            r"a huge page with one of its pages held: ",
            r"a huge page that a dead pager was about to punch: ",
            r"a page is written.* while it is held still: cancelled",
        ],
    }
    once = {
        "test_evict_held": [
            *(rf"{tracker:<5} a device writes into a page" for tracker in seen_io),
            *(rf"{tracker:<5} given up for" for tracker in trackers if tracker not in seen_io),
        ],
        "test_evict_race": [rf"{tracker}, freeze \w+: \d+ races: " for tracker in seen_io],
        "test_sweep": [
            rf"{tracker:<5} \d+ pages {what}"
            for tracker in seen_io
            for what in ("touched behind the sweep", "touched before a void scan", "brought back: candidates")
        ]
        + [
            rf"{tracker:<5} page \d+ touched {when}"
            for tracker in seen_io
            for when in ("when the first one had been armed", "before an arming that had to be tried again")
        ]
        + [rf"{tracker:<5} chunks that got slow" for tracker in seen_io]
        + [r"zap   \d\d huge pages mapped as one and touched"] * ("zap" in trackers),
        "test_rwp_given_up": [rf"{tracker:<5} takes over from rwp" for tracker in trackers if tracker not in seen_io],
        "test_fault_waiters": ["memory that has failed: answered"],
        "test_rwp_anonymous": [r"swapped out: \d{4,} pages"],
        "test_tracker_damon_host": ["damon_stat is on"],
        "test_tracker_idle": [
            r"\d{4} pages were swapped out",
            "huge pages: each seen as one",
            r"\d{3,} of \d{4} pages were migrated",
            r"last word of the bitmap: \d\d pages of it",
        ],
    }
    return [rf"{tracker:<5} {part}" for tracker in trackers for part in each.get(name, [])] + once.get(name, [])
