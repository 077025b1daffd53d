# SPDX-License-Identifier: Apache-2.0
"""The harness itself: what goes wrong inside is seen, said and bounded."""

import os
import random
import re
import signal
import time
from pathlib import Path

import pytest

from tests.kernel import GuestError, Kernel, KernelConfig

pytestmark = pytest.mark.timeout(300)


def test_it_is_ready_without_a_complaint(kernel: Kernel) -> None:
    release, *troubles = kernel.ready_text.strip().splitlines()
    assert release == kernel.shell("uname -r").strip() and troubles == []
    assert kernel.shell("ls -d /dev/kvm /sys/kernel/debug/tracing /sys/kernel/mm /sys/fs/cgroup/cgroup.procs")


def test_codes_and_both_streams_come_out(kernel: Kernel) -> None:
    result = kernel.run(["sh", "-c", "echo out; echo err >&2; exit 42"])
    assert (result.code, result.stdout, result.stderr) == (42, "out\n", "err\n")
    assert kernel.run(["sh", "-c", "kill -TERM $$"]).code == -signal.SIGTERM
    missing = kernel.run(["/no/such/program"])
    assert missing.code == 127 and "cannot run" in missing.stderr


def test_a_hang_is_ended_at_its_limit_and_says_where_it_hung(kernel: Kernel) -> None:
    result = kernel.run(["sh", "-c", "(setsid sleep 1234 &); sleep 4321"], timeout=2)
    assert result.over_limit and "nanosleep" in result.stderr
    with pytest.raises(GuestError, match="over its limit"):
        result.check()
    assert not re.search("1234|4321", kernel.shell("ps"))


def test_a_machine_that_has_stopped_is_told_from_one_that_lives(kernel: Kernel) -> None:
    assert not kernel.stands_still()
    os.kill(kernel.pid, signal.SIGSTOP)
    try:
        assert kernel.stands_still()
    finally:
        os.kill(kernel.pid, signal.SIGCONT)
    assert not kernel.stands_still() and kernel.shell("echo here") == "here\n"


def test_what_a_command_leaves_behind_is_killed_unless_it_is_to_be_kept(kernel: Kernel) -> None:
    kernel.run(["sh", "-c", "(setsid sleep 1234 &)"]).check()
    assert "1234" not in kernel.shell("ps")
    running = kernel.start(["sh", "-c", "setsid sleep 4321 & echo started"], keep_children=True)
    assert kernel.finish(running).stdout == "started\n"
    assert "4321" in kernel.shell("ps")
    running.kill()
    deadline = time.monotonic() + 20
    while "4321" in kernel.shell("ps"):
        assert time.monotonic() < deadline, "it lives on"


def test_bytes_go_in_and_out_as_they_are(kernel: Kernel) -> None:
    content = random.Random(1).randbytes(3 << 20)
    kernel.write("/tmp/bytes", content)
    assert kernel.read("/tmp/bytes") == content


def test_commands_run_side_by_side_and_can_be_signalled(kernel: Kernel) -> None:
    script = 'trap "echo caught; exit 3" TERM; echo ready; while :; do sleep 0.1; done'
    first, second = (kernel.start(["sh", "-c", script]) for _ in range(2))
    first.wait_for(lambda: "ready" in first.stdout(), 30, "ready")
    second.wait_for(lambda: "ready" in second.stdout(), 30, "ready")
    first.signal(signal.SIGTERM)
    result = kernel.finish(first)
    assert (result.code, result.stdout) == (3, "ready\ncaught\n") and not second.ended
    second.kill()
    assert kernel.finish(second).code == -signal.SIGKILL


def test_its_clock_is_ours(kernel: Kernel) -> None:
    def uptime() -> float:
        return float(kernel.shell("cat /proc/uptime").split()[0])

    start, began = uptime(), time.monotonic()
    time.sleep(5)
    inside, here = uptime() - start, time.monotonic() - began
    # Each look takes part of a second, on a busy machine more.
    assert abs(inside - here) < 2.5


def test_a_kernel_that_complains_or_panics_is_a_failure(tmp_path: Path) -> None:
    with Kernel(KernelConfig(memory_mib=512), tmp_path) as kernel:
        assert kernel.broken() is None
        running = kernel.start(["sh", "-c", "echo '<4>WARNING: made up' > /dev/kmsg"])
        deadline = time.monotonic() + 20
        while not kernel.broken():
            assert time.monotonic() < deadline, "no trouble is seen"
            time.sleep(0.1)
        assert "made up" in (kernel.broken() or "")
        with pytest.raises(GuestError, match=r"the kernel under test is in trouble: .*WARNING: made up"):
            kernel.finish(running)
    with Kernel(KernelConfig(memory_mib=512), tmp_path / "again") as kernel:
        with pytest.raises(GuestError, match="the guest is gone") as failure:
            kernel.run(["sh", "-c", "echo c > /proc/sysrq-trigger"])
        assert "Kernel panic - not syncing: sysrq triggered crash" in str(failure.value)
        assert kernel.broken()
