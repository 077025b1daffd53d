# SPDX-License-Identifier: Apache-2.0
"""Which memory cgroup a process is charged to, in both versions, and whether it may swap."""

from __future__ import annotations

import os
import subprocess

import pytest

from frostline.agent.memcg import NoGroupError, find_group, other_processes, why_not_aged
from tests.unit.agent.cgroups import SCOPE, FakeHost


def test_v2_is_charged_to_the_nearest_group_with_a_memory_controller(fake_host: FakeHost) -> None:
    group = find_group(fake_host.pid, fake_host.proc)
    assert (group.path, group.folder, group.unified) == (SCOPE, fake_host.scope, True)
    assert group.inode == fake_host.scope.stat().st_ino
    assert other_processes(group, fake_host.pid) == 1
    fake_host.cgroup_of(5, "0::/init.scope\n")
    (fake_host.mount / "init.scope").mkdir()
    assert find_group(5, fake_host.proc).path == "/"


def test_those_who_have_a_group_of_their_own_are_not_sharers(fake_host: FakeHost) -> None:
    other = fake_host.scope / "other"
    other.mkdir()
    (other / "cgroup.procs").write_text("1\n2\n3\n")
    group = find_group(fake_host.pid, fake_host.proc)
    assert other_processes(group, fake_host.pid) == 4
    (other / "memory.stat").write_text("")
    assert other_processes(group, fake_host.pid) == 1


def test_v1_is_charged_to_its_own_group(fake_host: FakeHost) -> None:
    # Beside a v2 hierarchy without controllers, as this line of a real host's file has it.
    fake_host.cgroup_of(fake_host.pid, f"9:name=systemd:/\n4:cpu,memory:{SCOPE}/libvirt\n0::/\n")
    with pytest.raises(NoGroupError, match="is not mounted here"):
        find_group(fake_host.pid, fake_host.proc)
    fake_host.mounts("/", "cgroup", "rw,cpu,memory")
    group = find_group(fake_host.pid, fake_host.proc)
    assert (group.path, group.folder, group.unified) == (f"{SCOPE}/libvirt", fake_host.below, False)
    assert other_processes(group, fake_host.pid) == 1


def test_a_mount_of_a_part_of_the_hierarchy(fake_host: FakeHost) -> None:
    fake_host.mounts("/pod", "cgroup2", "rw")
    fake_host.cgroup_of(fake_host.pid, f"0::/pod{SCOPE}\n")
    assert find_group(fake_host.pid, fake_host.proc).folder == fake_host.scope
    fake_host.cgroup_of(fake_host.pid, f"0::/podium{SCOPE}\n")
    with pytest.raises(NoGroupError, match="is not mounted here"):
        find_group(fake_host.pid, fake_host.proc)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("0::/../other\n", "outside of this agent's cgroup namespace"),
        ("9:pids:/x\n", "no memory cgroup"),
        ("", "no memory cgroup"),
        ("0::/gone (deleted)\n", "cannot be read"),
    ],
)
def test_what_cannot_be_found_is_said(fake_host: FakeHost, text: str, says: str) -> None:
    fake_host.cgroup_of(5, text)
    if "deleted" in text:
        (fake_host.mount / "memory.stat").unlink()
        fake_host.mounts("/", "cgroup", "rw,memory")
        fake_host.cgroup_of(5, "4:memory:/gone (deleted)\n")
    with pytest.raises(NoGroupError, match=says):
        find_group(5, fake_host.proc)
    with pytest.raises(NoGroupError, match="cannot be read"):
        find_group(6, fake_host.proc)


def test_who_may_not_swap_is_not_aged(fake_host: FakeHost) -> None:
    group = find_group(fake_host.pid, fake_host.proc)
    assert why_not_aged(group, fake_host.proc) == ""
    limit = fake_host.scope.parent / "memory.swap.max"
    limit.write_text(f"{64 * 4096 - 1}\n")
    assert why_not_aged(group, fake_host.proc).startswith(f"{limit} leaves it no swap")
    limit.write_text(f"{1 << 30}\n")
    assert why_not_aged(group, fake_host.proc) == ""
    (limit.parent / "memory.swap.current").write_text(f"{1 << 30}\n")
    assert "leaves it no swap" in why_not_aged(group, fake_host.proc)
    limit.write_text("what?\n")
    assert "cannot be found out" in why_not_aged(group, fake_host.proc)
    limit.write_text("max\n")
    swappiness = fake_host.proc / "sys/vm/swappiness"
    swappiness.write_text("0\n")
    assert f"{swappiness} is 0" in why_not_aged(group, fake_host.proc)
    swappiness.write_text("1\n")
    fake_host.meminfo(swap_free_kib=255)
    assert "no swap, or none left" in why_not_aged(group, fake_host.proc)


def test_v1_has_a_swappiness_of_its_own(fake_host: FakeHost) -> None:
    fake_host.cgroup_of(fake_host.pid, f"4:memory:{SCOPE}\n")
    fake_host.mounts("/", "cgroup", "rw,memory")
    group = find_group(fake_host.pid, fake_host.proc)
    (fake_host.proc / "sys/vm/swappiness").write_text("0\n")
    assert why_not_aged(group, fake_host.proc) == ""
    (fake_host.scope / "memory.swappiness").write_text("0\n")
    assert "memory.swappiness is 0" in why_not_aged(group, fake_host.proc)


def test_this_machines_own_processes_have_a_group_or_a_reason() -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        try:
            group = find_group(os.getpid())
        except NoGroupError as error:
            pytest.skip(f"this machine: {error}")
        assert group.inode == group.folder.stat().st_ino
        assert find_group(child.pid) == group
        assert other_processes(group, child.pid) >= 1
        assert isinstance(why_not_aged(group), str)
    finally:
        child.kill()
        child.wait(10)
