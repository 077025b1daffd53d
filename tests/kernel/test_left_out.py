# SPDX-License-Identifier: Apache-2.0
"""A test that has passed without trying is found out. Boots nothing."""

import pytest

from .left_out import PROPERTY, check_passed, left_out, must_say, silent
from .result import Result

SAID = b"""seed 7
rwp   100 % of the pages were migrated at once, by compaction
rwp   up to 5836 pages were in the host's swap
rwp   7383 pages stayed in the host's swap while others were evicted
rwp   4 huge pages made
rwp   4 huge pages split
idle  not tried: needs page_idle
"""


def result(said: bytes, code: int = 0) -> Result:
    return Result(("/tests/test_tracker_underneath",), code, said, b"", 1.0, over_limit=False)


def test_what_was_tried_passes_and_what_was_not_is_kept_for_the_summary(request: pytest.FixtureRequest) -> None:
    check_passed(result(SAID), must_say("test_tracker_underneath", ["rwp"]), request)
    assert request.node.user_properties == [(PROPERTY, "idle not tried: needs page_idle")]
    request.node.user_properties.clear()


@pytest.mark.parametrize("part", [b"migrated", b"were in", b"stayed", b"made", b"split"])
def test_each_part_must_have_been_tried(part: bytes, request: pytest.FixtureRequest) -> None:
    without = b"".join(line for line in SAID.splitlines(keepends=True) if part not in line)
    with pytest.raises(AssertionError, match="does not say"):
        check_passed(result(without), must_say("test_tracker_underneath", ["rwp"]), request)


def test_each_tracker_must_have_been_tried(request: pytest.FixtureRequest) -> None:
    with pytest.raises(AssertionError, match="damon up to"):
        check_passed(result(SAID), must_say("test_tracker_underneath", ["rwp", "damon"]), request)


@pytest.mark.parametrize(
    ("line", "kept"),
    [
        ("rwp   swap not tried: no zram to swap to", True),
        ("passthrough        skipped: no io_uring to pin memory with", True),
        ("14 refusals, 0 skipped", False),
        ("zap   took 4 s", False),
    ],
)
def test_lines_that_say_what_was_left_out(line: str, kept: bool) -> None:
    assert bool(left_out(result(line.encode()))) == kept


def test_a_race_that_was_not_tried_with_rwp_is_found_out() -> None:
    said = b"zap, freeze wp: 254 races: 167 evictions cancelled by a touch\nrwp not tried: it is not possible here\n"
    wanted = must_say("test_evict_race", ["rwp", "zap"])
    assert silent(result(said), wanted) == [r"rwp, freeze \w+: \d+ races: "]
