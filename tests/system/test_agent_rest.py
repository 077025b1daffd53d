# SPDX-License-Identifier: Apache-2.0
"""What the agent costs when nothing happens: ten attached VMs that do nothing, default intervals."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.system.agent_rig import AgentRig, wait_for

VMS = 10
MEASURED_SECONDS = 20.0
OBSERVE = "version: 1\nclasses:\n  standard: {mode: observe}\n"
pytestmark = pytest.mark.timeout(200)


@pytest.fixture
def idle_vms() -> Iterator[list[str]]:
    """VMs that were never started: nothing in them touches memory."""
    program = shutil.which("qemu-system-x86_64")
    if program is None or os.geteuid() != 0:
        pytest.skip("needs root and qemu-system-x86_64: install qemu-system-x86")
    names = [f"idle-{os.getpid()}-{number}" for number in range(VMS)]
    with ExitStack() as stack:
        for name in names:
            command = [program, "-name", name, "-S", "-display", "none", "-no-user-config", "-nodefaults", "-m", "64"]
            command += ["-object", "memory-backend-memfd,id=ram0,size=64M,share=on"]
            command += ["-machine", "pc,memory-backend=ram0", "-accel", "tcg,tb-size=8"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            stack.callback(process.wait, 20)
            stack.callback(process.kill)
        yield names


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_the_agent_at_rest_takes_at_most_one_percent_of_a_core(idle_vms: list[str]) -> None:
    with AgentRig(idle_vms, policy=OBSERVE) as rig:
        rig.write_limits(idle_vms, "scan_interval: 5s\n")
        process = rig.start("--discovery-interval", "2s", "--report-interval", "10s")
        wait_for("all to be served", lambda: sum(vm["phase"] == "served" for vm in rig.vms().values()) == VMS, 60)
        time.sleep(5)
        before, started = cpu_seconds(process.pid), time.monotonic()
        time.sleep(MEASURED_SECONDS)
        share = (cpu_seconds(process.pid) - before) / (time.monotonic() - started)
        print(f"agent at rest with {VMS} VMs: {share:.2%} of a core")
        assert share <= 0.01
