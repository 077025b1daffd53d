# SPDX-License-Identifier: Apache-2.0
"""The cold-size estimate, from what a Linux 7.3 said of a VMM's stand-in: 64 MiB of shared memory, 8 MiB of it hot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from frostline.agent import mglru
from frostline.agent.mglru import COLD_AGES_SECONDS, ColdEstimate, Memcg, Mglru, NoEstimateError, estimate
from frostline.agent.mglru import parse_lru_gen as parse
from tests.unit.agent.cgroups import SCOPE, FakeHost

SAMPLES = Path(__file__).parent / "lru_gen"
PAGE = os.sysconf("SC_PAGE_SIZE")
HOT_PAGES, ALL_PAGES = 2048, 16384


def sample(name: str) -> str:
    return (SAMPLES / f"{name}.txt").read_text()


def scope_of(text: str) -> Memcg:
    [found] = parse(text, lambda _number, path: path == SCOPE)
    return found


def test_a_real_file_is_read_whole_or_in_parts() -> None:
    everything = parse(sample("swap"), lambda _number, _path: True)
    assert [(each.number, each.path) for each in everything] == [
        (1, "/"),
        (28, "/machine.slice"),
        (106, SCOPE),
        (164, "/machine.slice/two words"),
        (67, "/system.slice"),
    ]
    assert all(len(each.nodes) == 1 and len(each.nodes[0]) == 4 for each in everything)
    assert [generation.anon_pages for generation in scope_of(sample("swap")).nodes[0]] == [14345, 0, 2051, 0]
    assert [each.path for each in parse(sample("swap"), lambda number, _path: number == 67)] == ["/system.slice"]


def test_what_was_cold_is_found_and_what_was_hot_is_not_in_it() -> None:
    found = estimate(scope_of(sample("swap")), 0)
    # Untouched since the first look, which was 137 s before the last one; that one was 4 s ago.
    cold_pages = found.cold_bytes[0] / PAGE
    assert COLD_AGES_SECONDS[0] == 120 and found.cold_bytes[1:] == (0, 0, 0)
    assert ALL_PAGES - HOT_PAGES <= cold_pages <= (ALL_PAGES - HOT_PAGES) * 1.01
    assert found.looked_seconds == pytest.approx(4.136)


def test_what_the_kernel_has_never_looked_at_is_unknown_and_not_cold() -> None:
    with pytest.raises(NoEstimateError, match="has not looked at cgroup /machine"):
        estimate(scope_of(sample("never-aged")), 0)


def test_a_group_without_memory_on_the_lists_is_unknown() -> None:
    [empty] = parse(sample("swap"), lambda number, _path: number == 28)
    with pytest.raises(NoEstimateError, match="locked or huge"):
        estimate(empty, 0)


def generations(*lines: str, node: int = 0) -> str:
    return f" node {node:5}\n" + "".join(f"{line}\n" for line in lines)


def test_nodes_add_up_and_the_longest_look_back_counts() -> None:
    one = generations("1 9000000 10 99", "2 8000000 20 99", "3 5000 30 99")
    two = generations("7 700000 5 0", "8 690000 0 0", "9 1000 0 0", node=1)
    empty = generations("0 99000000 0 7", "1 99000000 0 7", node=2)
    [found] = parse(f"memcg 5 /a\n{one}{two}{empty}", lambda _number, _path: True)
    got = estimate(found, 2)
    # The youngest generations, and the one that was born before the last look, may be hot.
    assert got == ColdEstimate((15 * PAGE, 15 * PAGE, 10 * PAGE, 0), 5.0, 2)


def test_ages_that_have_gone_round_make_it_too_small_and_never_negative() -> None:
    lines = generations("1 4294967000 10 0", "2 1000 10 0", "3 900000 10 0", "4 200000 10 0")
    [found] = parse(f"memcg 5 /a\n{lines}", lambda _number, _path: True)
    assert estimate(found, 0).cold_bytes == (10 * PAGE, 10 * PAGE, 0, 0)


@pytest.mark.parametrize(
    "text",
    [
        "memcg\n node 0\n",
        "memcg x /a\n",
        "memcg 5 /a\n 1 2 3 4\n",
        "memcg 5 /a\n node 0\n 1 2 3\n",
        "memcg 5 /a\n node 0\n 1 2 x 4\n",
        "memcg 5 /a\n node 0\n\n",
    ],
)
def test_what_is_no_such_file_is_refused_with_the_line(text: str) -> None:
    with pytest.raises(NoEstimateError, match=r"line \d of lru_gen is not as expected"):
        parse(text, lambda _number, _path: True)
    assert parse("nothing\nof ours\n", lambda _number, _path: True) == []


def test_an_estimate_is_never_more_than_the_vm_has() -> None:
    assert ColdEstimate((500, 400, 10, 0), 1.0, 0).within(450).cold_bytes == (450, 400, 10, 0)


def test_from_a_process_to_its_estimate(fake_host: FakeHost) -> None:
    fake_host.lru_gen(sample("swap"))
    found = fake_host.mglru().estimates([fake_host.pid])[fake_host.pid]
    assert isinstance(found, ColdEstimate)
    assert found.cold_bytes[0] == 14345 * PAGE and found.sharers == 1
    document = found.document()
    assert document["ages"][0] == {"min_age_seconds": 120.0, "cold_bytes": 14345 * PAGE}
    assert "estimate" in document["caveats"] and "VMM's own memory" in document["caveats"]


def test_the_inode_names_the_group_from_within_a_namespace_too(fake_host: FakeHost) -> None:
    inode = fake_host.scope.stat().st_ino
    twin = "memcg 3 " + SCOPE + "\n" + generations("1 9000000 7 0", "2 8000000 7 0", "3 5000 7 0")
    ours = f"memcg {inode} /outer{SCOPE}\n" + generations("1 9000000 1 0", "2 8000000 1 0", "3 5000 1 0")
    fake_host.lru_gen(twin + ours)
    found = fake_host.mglru().estimates([fake_host.pid])[fake_host.pid]
    assert isinstance(found, ColdEstimate) and found.cold_bytes[0] == PAGE
    # A number that happens to be somebody else's (older kernels count otherwise) is no match.
    fake_host.lru_gen(twin + ours.replace("/outer" + SCOPE, "/other"))
    found = fake_host.mglru().estimates([fake_host.pid])[fake_host.pid]
    assert isinstance(found, ColdEstimate) and found.cold_bytes[0] == 7 * PAGE
    fake_host.lru_gen("memcg 3 /x\n")
    assert fake_host.mglru().estimates([fake_host.pid])[fake_host.pid] == f"cgroup {SCOPE} is not in lru_gen"


def test_without_swap_there_is_no_estimate_though_the_file_looks_like_one(fake_host: FakeHost) -> None:
    # As it was seen: with a hot part, and all of it in one generation that is neither young nor true.
    believed = estimate(scope_of(sample("no-swap")), 0)
    assert believed.looked_seconds == pytest.approx(3.048)
    fake_host.lru_gen(sample("no-swap"))
    fake_host.meminfo(swap_free_kib=0)
    assert "no swap" in str(fake_host.mglru().estimates([fake_host.pid])[fake_host.pid])


def test_what_is_absent_is_said(fake_host: FakeHost, tmp_path: Path) -> None:
    fake_host.lru_gen(sample("swap"))
    assert fake_host.mglru().why_not() == ""
    fake_host.switch.write_text("0x0006\n")
    assert "is switched off" in fake_host.mglru().why_not()
    fake_host.switch.write_text("0x0007\n")
    fake_host.file.unlink()
    assert "needs debugfs" in fake_host.mglru().why_not()
    absent = Mglru(proc=fake_host.proc, sys=tmp_path / "nothing")
    assert absent.estimates([fake_host.pid]) == {fake_host.pid: "mglru needs a kernel with CONFIG_LRU_GEN"}
    assert absent.estimates([]) == {}


def test_one_vm_without_an_answer_costs_the_others_nothing(fake_host: FakeHost) -> None:
    fake_host.lru_gen(sample("swap"))
    found = fake_host.mglru().estimates([4, fake_host.pid])
    assert "cannot be read" in str(found[4]) and isinstance(found[fake_host.pid], ColdEstimate)


def test_reading_is_bounded(fake_host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_host.lru_gen(sample("swap") * 2)
    monkeypatch.setattr(mglru, "MAX_FILE_BYTES", len(sample("swap")))
    assert "too long to be read" in str(fake_host.mglru().estimates([fake_host.pid])[fake_host.pid])
    monkeypatch.undo()
    monkeypatch.setattr(mglru, "MAX_READ_SECONDS", -1.0)
    assert "too long to be read" in str(fake_host.mglru().estimates([fake_host.pid])[fake_host.pid])
