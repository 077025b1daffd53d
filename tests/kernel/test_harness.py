# SPDX-License-Identifier: Apache-2.0
"""The harness itself: what goes wrong inside is seen, said and bounded."""

import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.kernel import GuestError, Kernel, KernelConfig
from tests.system.guest.qmp import QmpClient

pytestmark = pytest.mark.timeout(300)
SVM_ENABLED = 0x1000  # in EFER
STOP = "0f01ddfbf4"  # clgi; sti; hlt


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


class Debugger:
    """As much of GDB's remote protocol as writing into the emulated machine's memory needs; it waits meanwhile."""

    def __init__(self, monitor: QmpClient, path: Path) -> None:
        monitor.execute("human-monitor-command", command_line=f"gdbserver unix:{path},server=on,wait=off")
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.settimeout(20)
        self._connection.connect(str(path))

    def ask(self, request: str) -> None:
        self._connection.sendall(f"${request}#{sum(request.encode()) % 256:02x}".encode())
        answer = b""
        while not (found := re.search(rb"\$(OK|E\w*)#", answer)):  # before it, that the machine has stopped is told
            answer += self._connection.recv(4096)
        assert found[1] == b"OK", answer

    def close(self) -> None:
        self.ask("D")
        self._connection.close()


def registers(kernel: Kernel, name: str) -> list[int]:
    """One of each CPU."""
    texts = [
        kernel.monitor.execute("human-monitor-command", command_line="info registers", cpu_index=cpu)
        for cpu in range(kernel.config.vcpus)
    ]
    return [int(match[1], 16) for text in texts if (match := re.search(rf"\b{name}\s*=([0-9a-f]+)", text))]


def test_a_cpu_that_the_emulator_has_stopped_is_told_from_ones_that_live(tmp_path: Path) -> None:
    with Kernel(KernelConfig(memory_mib=512), tmp_path) as kernel:
        assert kernel.stopped() is None
        running = kernel.start(["sh", "-c", "while :; do :; done"])
        assert kernel.stopped() is None and kernel.broken() is None
        running.kill()
        assert all(efer & SVM_ENABLED for efer in registers(kernel, "EFER")), "no CPU of it can run a VM"
        deadline = time.monotonic() + 20
        while len(set(halted := registers(kernel, "RIP"))) > 1 or registers(kernel, "HLT") != [1, 1]:
            assert time.monotonic() < deadline, "it is never idle"
            time.sleep(0.05)
        debugger = Debugger(kernel.monitor, tmp_path / "debugger")
        debugger.ask(f"M{halted[0]:x},{len(STOP) // 2:x}:{STOP}")
        debugger.close()
        asked = kernel.start(["true"])
        deadline = time.monotonic() + 60  # until each CPU has come by there
        while (why := kernel.stopped()) is None:
            assert time.monotonic() < deadline and not asked.ended, "no CPU has stopped"
        assert "with interrupts enabled, and has not taken interrupt" in why
        assert kernel.broken() == why and not asked.ended


def test_a_kernel_that_holds_interrupts_off_is_not_taken_for_a_stopped_emulator(tmp_path: Path) -> None:
    with Kernel(KernelConfig(memory_mib=512, command_line=("panic=0",)), tmp_path) as kernel:
        kernel.start(["sh", "-c", "echo c > /proc/sysrq-trigger"])
        deadline = time.monotonic() + 20
        while not kernel.broken():
            assert time.monotonic() < deadline, "it does not panic"
            time.sleep(0.1)
        assert kernel.stopped() is None
        assert "sysrq triggered crash" in (kernel.broken() or "")
