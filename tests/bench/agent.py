# SPDX-License-Identifier: Apache-2.0
"""What an agent takes of a core while its one VM does nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from frostline.native import NativeError, View
from tests.bench.errors import BenchError, Skipped
from tests.bench.lines import LineProcess, dies_with_us
from tests.bench.victim import Programs

VM_NAME: Final = "frostline-bench"
VM_MIB: Final = 64
ATTACH_SECONDS: Final = 60.0
SETTLE_SECONDS: Final = 3.0
END_SECONDS: Final = 60.0
# No other VM of this host is touched, whoever runs one.
POLICY: Final = f"""\
version: 1
default_class: left_alone
classes:
  left_alone: {{mode: off}}
vms:
  {VM_NAME}: {{class: standard}}
"""


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _wait_attached(agent: subprocess.Popen[bytes], vm_pid: int, log: Path) -> None:
    deadline = time.monotonic() + ATTACH_SECONDS
    while True:
        if agent.poll() is not None:
            raise BenchError(f"frostline-agent ended with {agent.returncode}: {log.read_text()[-400:]}")
        try:
            View(vm_pid).close()
            return
        except NativeError:
            pass
        if time.monotonic() > deadline:
            raise BenchError(f"frostline-agent did not attach in {ATTACH_SECONDS:.0f} s: {log.read_text()[-400:]}")
        time.sleep(0.1)


def cpu_percent_at_rest(programs: Programs, folder: Path, seconds: float) -> float:
    """Of one core, over ``seconds``, with the pager not counted. Raises Skipped where there is no agent."""
    program = Path(sys.executable).parent / "frostline-agent"
    if not program.is_file():
        raise Skipped(f"{program} is not installed")
    # The agent knows an emulator by its name.
    emulator = folder / "qemu-system-x86_64"
    shutil.copy(programs.path("bench_victim"), emulator)
    policy, log = folder / "policy.yaml", folder / "agent.log"
    policy.write_text(POLICY)
    vm = LineProcess([str(emulator), "--name", VM_NAME, "--mib", str(VM_MIB)])
    try:
        vm.line()
        command = [
            str(program), "standalone", "--policy", str(policy), "--run-dir", str(folder / "run"),
            "--metrics-listen", "", "--pager", str(programs.pager), "--log-format", "json", "--detach-on-exit",
        ]  # fmt: skip
        with log.open("wb") as output:
            agent = subprocess.Popen(command, stdout=output, stderr=output, preexec_fn=dies_with_us)
        try:
            _wait_attached(agent, vm.pid, log)
            time.sleep(SETTLE_SECONDS)
            before, start = _cpu_seconds(agent.pid), time.monotonic()
            time.sleep(seconds)
            return 100 * (_cpu_seconds(agent.pid) - before) / (time.monotonic() - start)
        finally:
            agent.send_signal(signal.SIGTERM)
            try:
                agent.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                agent.kill()
                agent.wait(END_SECONDS)
    finally:
        vm.close()
