# SPDX-License-Identifier: Apache-2.0
"""The arithmetic between bench_trackers' lines and docs/trackers.md."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.bench.machine import this_machine
from tests.bench.trackers import markdown, plots, reading, report
from tests.bench.trackers.places import Failed, Measured, OwnKernel, parse_lines
from tests.bench.trackers.points import PAGES_PER_GIB, Point, Probe, Steady
from tests.bench.trackers.suite import Amounts, Bench, PlaceResults

GIB = PAGES_PER_GIB


def point(tracker: str, touched: int, scanner_ms: float, guest_ms: float, pages: int = GIB) -> Point:
    """Two rounds, the second disturbed."""
    return Point(
        guest="plain", tracker=tracker, pages=pages, touched=touched, mappers=0,
        arm_ns=(int(scanner_ms * 0.75e6), int(scanner_ms * 5e6)),
        harvest_ns=(int(scanner_ms * 0.25e6), int(scanner_ms * 5e6)),
        plain_ns=(1_000_000, 7_000_000), armed_ns=(1_000_000 + int(guest_ms * 1e6), 9_000_000_000),
        stop_ns=(500_000, 9_000_000), right=(touched, touched), missed=(0, 0), wrong=(0, 0), grain=(1, 1),
    )  # fmt: skip


RWP = [point("rwp", 0, 5, 0), point("rwp", GIB // 4, 15, 100), point("rwp", GIB, 45, 400)]
IDLE = [point("idle", 0, 300, 0), point("idle", GIB // 4, 305, 5), point("idle", GIB, 320, 20)]


def test_a_line_becomes_a_point() -> None:
    line = {"kind": "rounds", **{name: getattr(RWP[1], name) for name in Point.__dataclass_fields__}}
    assert parse_lines(f"some warning\n{json.dumps(line)}\n") == [RWP[1]]


def test_what_is_not_known_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="'other'"):
        parse_lines('{"kind": "other"}')
    with pytest.raises(KeyError):
        parse_lines('{"kind": "probe", "tracker": "rwp"}')


def test_costs_are_of_the_round_that_was_disturbed_least() -> None:
    one = RWP[1]
    assert one.scanner_ms == pytest.approx(15)
    assert one.guest_ms == pytest.approx(100)
    assert one.guest_us_per_page == pytest.approx(100_000 / (GIB // 4))
    assert one.scanner_median_ms == pytest.approx((15 + 150) / 2)
    assert one.stop_us == 500
    # 100 ms of faults and a stop of 0.5 ms, each 10 s.
    assert one.guest_share(10) == pytest.approx(0.01005)
    assert RWP[0].guest_us_per_page is None


def test_costs_are_of_the_rounds_that_saw_most_finely() -> None:
    one = replace(RWP[1], grain=(2, 1))
    assert one.finest == 1 and one.guest_ms == pytest.approx(8993) and one.stop_us == 9000
    assert one.scanner_ms == pytest.approx(150) and one.scanner_median_ms == pytest.approx(150)
    regions = replace(RWP[1], grain=(4, 4))
    assert regions.scanner_ms == pytest.approx(15)
    assert "| 11 + 3.8 (regions of 4 pages) |" in markdown.costs([regions])


def test_a_guest_that_was_faster_when_armed_pays_nothing_rather_than_less() -> None:
    assert replace(RWP[1], armed_ns=(900_000, 900_000)).guest_ms == 0


def test_recall_and_precision() -> None:
    seen = replace(RWP[1], right=(60, 30), missed=(30, 0), wrong=(0, 10))
    assert seen.recall == pytest.approx(0.75)
    assert seen.precision == pytest.approx(0.9)
    nothing = replace(RWP[0], right=(0, 0))
    assert nothing.recall is None and nothing.precision is None
    assert replace(nothing, wrong=(1, 0)).precision == 0


def test_rounds_by_regions_are_told_from_those_that_are_exact_to_a_page() -> None:
    damon = point("damon", 100, 2, 1)
    damon = replace(damon, right=(100, 50), missed=(0, 50), wrong=(0, 50), grain=(1, 2))
    exact, regions = damon.by_grain().values()
    assert exact.recall == 1 and exact.arm_ns == damon.arm_ns[:1]
    assert regions.recall == 0.5 and regions.guest_ms == pytest.approx((damon.armed_ns[1] - damon.plain_ns[1]) / 1e6)
    place = PlaceResults("here", "a place", "7.3", emulated=True, by_touched=[damon], kvm=[regions])
    found = {row.key: row for row in report.rows(place)}
    assert found["here.exact.damon.plain"].met is True and found["here.exact.damon.plain"].limit == 99
    assert "here.exact.damon.kvm" not in found, "by regions it is an estimate"
    assert [line.split(" | ")[2:6] for line in markdown.accuracy(place).splitlines()[2:]] == [
        ["1", "1", "100", "100"], ["2", "1", "100", "50.000"], ["2", "1", "100", "50.000"],
    ]  # fmt: skip


def test_the_model_is_the_line_through_both_ends() -> None:
    model = reading.cost_model(RWP)
    assert model is not None
    assert model.fixed_ms_per_gib == pytest.approx(5)
    assert model.scanner_us_per_page == pytest.approx(40_000 / GIB)
    assert model.guest_us_per_page == pytest.approx(400_000 / GIB)
    assert reading.cost_model(RWP[:2]) is None and reading.cost_model(RWP[1:]) is None


def test_totals_cross_between_the_points_they_cross_between() -> None:
    # At 1/4: 115 against 310; at all: 445 against 340. A straight line is level at 195 of 300 between them.
    assert reading.crossing(RWP, IDLE) == pytest.approx(0.25 + 0.75 * 195 / 300)
    assert reading.crossing(IDLE, RWP) is None, "it comes down, it does not rise above"
    assert reading.crossing(RWP, RWP) is None
    assert reading.crossing(RWP[:1], IDLE) is None


def test_ratio_is_of_the_scanners_part_only() -> None:
    assert reading.ratio_at(RWP + IDLE, "idle", "rwp", GIB // 4) == pytest.approx(305 / 15)
    assert reading.ratio_at(RWP, "idle", "rwp", GIB // 4) is None


def test_slope_is_by_the_smallest_and_the_largest_vm() -> None:
    sizes = [point("rwp", 100, 1 + 4 * gib, 1, gib * GIB) for gib in (4, 1, 16)]
    assert reading.slope_ms_per_gib(sizes) == pytest.approx(4)
    assert reading.slope_ms_per_gib(sizes[:1]) is None


def test_slow_down_is_by_neighbouring_windows() -> None:
    # The second pair ran on a machine half as fast.
    steady = Steady("plain", "rwp", GIB, GIB, 10, 0, (95, 48, 90), (100, 50, 100))
    assert steady.slow_down == pytest.approx(0.05)
    assert list(steady.spread) == pytest.approx([0.04, 0.1])


class Recorded:
    """A place that answers with what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def run(self, arguments: Sequence[str], limit_seconds: float) -> list[Measured]:
        self.asked.append(list(arguments))
        if arguments == ["probe"]:
            return [
                *(Probe(name, True, "exact") for name in ("rwp", "zap", "idle")),
                Probe("damon", False, "needs DAMON"),
            ]
        asked = dict(zip(arguments[::2], arguments[1::2], strict=True))
        pages = int(asked["--mib"]) * 256
        if "--steady" in asked:
            return [Steady("plain", asked["--trackers"], pages, pages, int(asked["--steady"]), 0, (9,), (10,))]
        touched = [int(text) for text in asked["--touched"].split(",")]
        mappers, guest = int(asked.get("--mappers", 0)), asked.get("--guest", "plain")
        made = [point(asked["--trackers"], each, 2, 1, pages) for each in touched]
        if asked["--trackers"] == "zap" and len(touched) == 1:
            raise Failed("zap: timed out", list(made))
        return [replace(one, mappers=mappers, guest=guest) for one in made]


def measured() -> tuple[Recorded, PlaceResults]:
    place, results = Recorded(), PlaceResults("here", "a place", "7.3", emulated=True)
    amounts = Amounts(
        2, 3, 64, (0, 16, 1), sizes_mib=(64, 256), mapped_mib=64, steady_mib=64, steady=((10, 3), (30, 1)), kvm_mib=16
    )
    Bench(place, results, amounts, lambda _: None).run()
    return place, results


def test_a_place_is_asked_for_all_of_it() -> None:
    place, results = measured()
    assert [one.touched for one in results.touched_by("rwp")] == [0, 1024, 16384]
    assert [(one.pages, one.touched) for one in results.sizes_by("idle")] == [(16384, 16384), (65536, 16384)]
    assert {one.mappers for one in results.mapped} == {0, 8}
    assert {one.guest for one in results.kvm} == {"kvm"}
    assert results.steady[0].slow_down == pytest.approx(0.1)
    assert [one.window_seconds for one in results.steady] == [10] * 3 + [30] * 3
    assert results.trackers() == ["rwp", "zap", "idle"]
    assert {len(one.arm_ns) for one in results.touched_by("rwp")} == {4}, "two rounds of each of two trials"
    order = [asked[1] for asked in place.asked if "--touched" in asked][:6]
    assert order == ["rwp", "zap", "idle"] * 2, "trackers take turns, so that a disturbance does not meet one alone"


def test_what_fails_is_noted_and_the_rest_goes_on() -> None:
    _, results = measured()
    assert set(results.failures) == {"zap: timed out"}
    assert [one.pages for one in results.sizes_by("zap")] == [16384, 65536], "what it had measured is kept"
    assert [one.pages for one in results.sizes_by("idle")] == [16384, 65536]


def test_what_is_held_to_a_limit() -> None:
    _, results = measured()
    rows = {row.key: row for row in report.rows(results)}
    assert rows["here.idle_by_rwp"].value == 1 and rows["here.idle_by_rwp"].met is False
    assert rows["here.exact.rwp.kvm"].met is True and "here.exact.damon.kvm" not in rows
    results.kvm[0] = replace(results.kvm[0], missed=(1, 0, 0, 0))
    met = {row.key: row.met for row in report.rows(results)}
    assert met["here.exact.rwp.kvm"] is False and met["here.exact.rwp.plain"] is True, (
        "each guest is held to it by itself"
    )


def test_report_and_plots_are_written(tmp_path: Path) -> None:
    _, results = measured()
    written = plots.plot_by_size([results], tmp_path / "size") + plots.plot_by_touched(results, tmp_path / "touched")
    assert sorted(path.name for path in written) == ["size.png", "size.svg", "touched.png", "touched.svg"]
    assert all(path.stat().st_size > 5000 for path in written)
    first = (tmp_path / "size.svg").read_bytes()
    plots.plot_by_size([results], tmp_path / "size")
    assert (tmp_path / "size.svg").read_bytes() == first, "the same figures make the same file"
    report.write(tmp_path / "r.json", report.document(this_machine(), 0.0, True, [results], ["no idle kernel"]))
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["skipped"] == ["no idle kernel"]
    assert document["places"]["here"]["probes"]["damon"]["possible"] is False
    assert {guest: len(models) for guest, models in document["models"]["here"].items()} == {
        "plain process": 3,
        "KVM guest": 3,
    }


def test_tables_for_the_document() -> None:
    _, results = measured()
    results.kvm[0] = replace(results.kvm[0], missed=(1, 0, 0, 0))
    text = markdown.tables([results])
    assert text.startswith("## a place: Linux 7.3\n\nA plain process of 64 MiB.\n")
    rows = [line.split(" | ") for line in text.splitlines()]
    exact = {(row[0], row[1]): row[5] for row in rows if len(row) == 7 and row[2].isdigit()}
    assert exact["| `zap`", "KVM guest"] == "100", "what was measured before a failure counts"
    assert exact["| `rwp`", "KVM guest"].startswith("99."), "one missed page is not rounded away"
    assert exact["| `rwp`", "plain process"] == "100"


def test_slow_downs_follow_from_the_charge_for_a_page() -> None:
    points = [replace(RWP[0], pages=16384, touched=16384, plain_ns=(5, 7), armed_ns=(32_768_005, 40_000_000))]
    head, _, row = markdown.slow_downs(points).splitlines()
    assert "10 / 30 / 120 s" in head
    assert row == "| all | 5.2 / 1.7 / 0.44 |", "2 us for each of 262,144 pages are 0.52 s"


def test_the_longest_stop_is_of_the_best_round() -> None:
    assert markdown.stops([RWP[2], IDLE[0]]).splitlines()[2:] == ["| nothing | - | 500 |", "| all | 500 | - |"]


def test_a_place_with_one_size_has_no_plot_by_size(tmp_path: Path) -> None:
    empty = PlaceResults("here", "a place", "7.3", emulated=False, by_size=[RWP[0]])
    assert plots.plot_by_size([empty], tmp_path / "size") == []
    assert plots.plot_by_touched(empty, tmp_path / "touched") == []


def test_a_program_that_fails_says_what_it_said(tmp_path: Path) -> None:
    program = tmp_path / "bench_trackers"
    program.write_text("#!/bin/sh\necho '{\"kind\":\"probe\",\"tracker\":\"rwp\",\"possible\":true,\"detail\":\"d\"}'\n"
                       "test $1 = probe || { echo 'no memory' >&2; exit 1; }\n")  # fmt: skip
    program.chmod(0o755)
    assert OwnKernel(program).run(["probe"], 10) == [Probe("rwp", True, "d")]
    with pytest.raises(Failed, match="no memory"):
        OwnKernel(program).run(["--mib", "1"], 10)
