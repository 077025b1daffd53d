# SPDX-License-Identifier: Apache-2.0
"""Runs real agents against real guests: a run folder, files, the process, and what it says on its admin socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from frostline.agent import admin

POLL_SECONDS: Final = 0.1
T = TypeVar("T")

ENFORCE: Final = """version: 1
classes:
  standard: {mode: enforce, min_idle_age: 2s, floor: 5%, cap: 95%, rate: unlimited}
"""


def wait_for(what: str, look: Callable[[], T | None], seconds: float = 20.0) -> T:
    """Look until there is something to see; AssertionError with what was waited for after the time limit."""
    deadline = time.monotonic() + seconds
    while True:
        found = look()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {seconds:g} s in vain for {what}")
        time.sleep(POLL_SECONDS)


class AgentRig:
    """One agent process; a context manager that ends it, and every pager that it left behind."""

    def __init__(self, only: Sequence[str], *, policy: str = ENFORCE, limits: str = "") -> None:
        """``only``: names of the VMs it may touch; others on this machine are none of its business."""
        self.only: Final = frozenset(only)
        # Unix sockets do not fit below pytest's long folder names.
        self.folder: Final = Path(tempfile.mkdtemp(prefix="fl-agent-"))
        self.run_dir: Final = self.folder / "run"
        self.policy_path: Final = self.folder / "policy.yaml"
        self.limits_path: Final = self.folder / "limits.yaml"
        self.log_path: Final = self.folder / "agent.log"
        self.policy_path.write_text(policy)
        self.write_limits(only, limits)
        self.process: subprocess.Popen[bytes] | None = None

    def write_limits(self, only: Sequence[str], more: str = "") -> None:
        interval = "" if "scan_interval" in more else "scan_interval: 500ms\n"
        # A machine under test may be so busy that its brake would keep everything here.
        interval += "" if "stall_target" in more else "stall_target: 100%\n"
        base = f"version: 1\nonly: {json.dumps(list(only))}\n{interval}"
        self.limits_path.write_text(base + (more or "allow_evict: true\n"))

    def start(self, *arguments: str, standalone: bool = True, run_dir: Path | None = None) -> subprocess.Popen[bytes]:
        """Start the agent; not waited for."""
        mode = ["standalone", "--policy", str(self.policy_path)] if standalone else ["run"]
        command = [sys.executable, "-m", "frostline.agent.main", *mode]
        command += ["--limits", str(self.limits_path), "--run-dir", str(run_dir or self.run_dir)]
        command += ["--discovery-interval", "300ms", "--metrics-listen", "127.0.0.1:0", "--log-format", "json"]
        command += ["--report-interval", "500ms", *arguments]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self.process

    def ask(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another frostline-agent command on the same run folder."""
        command = [sys.executable, "-m", "frostline.agent.main", *arguments, "--run-dir", str(self.run_dir)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    def ask_probe(self, *arguments: str) -> dict[str, Any]:
        """What `probe --json` says on the same run folder."""
        answer = self.ask("probe", "--json", *arguments)
        assert answer.returncode == 0, answer.stderr
        return dict(json.loads(answer.stdout))

    def vms(self) -> dict[str, dict[str, Any]]:
        """What the agent says of ours on its admin socket, by name; empty while no agent answers."""
        try:
            answer = asyncio.run(admin.ask(self.run_dir / "admin.sock", admin.AdminRequest(method="status")))
        except admin.AdminError:
            return {}
        return {str(vm["name"]): vm for vm in answer["vms"] if vm["name"] in self.only}

    def vm(self, name: str) -> dict[str, Any]:
        return self.vms().get(name, {})

    def wait_vm(
        self, name: str, wanted: Callable[[dict[str, Any]], object], what: str, seconds: float = 30.0
    ) -> dict[str, Any]:
        """Wait until a VM is as wanted; the failure shows the last answer and the agent's log."""
        last: dict[str, Any] = {}

        def look() -> dict[str, Any] | None:
            nonlocal last
            last = self.vm(name) or last
            try:
                return last if last and wanted(last) else None
            except TypeError:  # no pager yet, or no grant
                return None

        try:
            return wait_for(f"{name} to be {what}", look, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}; last: {last}\n{self.log_tail()}") from None

    def wait_served(self, name: str) -> dict[str, Any]:
        return self.wait_vm(name, lambda vm: vm["phase"] == "served" and vm["pager"]["pid"], "served")

    def wait_evicted(self, name: str, at_least_bytes: int) -> dict[str, Any]:
        """Served by a living pager, and so much is away (which it may be before this agent's pager lives)."""
        return self.wait_vm(
            name,
            lambda vm: (
                vm["phase"] == "served"
                and vm["pager"]
                and vm["pager"]["pid"] > 1  # 0 would be our own process group to kill(2)
                and vm["pager"]["evicted_bytes"] >= at_least_bytes
            ),
            f"evicted by {at_least_bytes >> 20} MiB",
            90,
        )

    def log(self) -> list[dict[str, Any]]:
        """The agent's log lines."""
        lines = []
        for line in self.log_path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(line))
        return lines

    def logged(self, event: str) -> list[dict[str, Any]]:
        return [line for line in self.log() if line.get("event") == event]

    def log_tail(self, lines: int = 30) -> str:
        return "\n".join(self.log_path.read_text().splitlines()[-lines:])

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, and the exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def kill(self) -> None:
        """SIGKILL: crash-only."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def __enter__(self) -> Self:
        return self

    def _kill_pagers(self) -> list[int]:
        """Kill every pager whose socket is in our folder; gives back those that were still there."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if str(self.folder).encode() in (command := path.read_bytes()) and b"frostline-pager" in command:
                    found.append(int(path.parent.name))
                    os.kill(found[-1], signal.SIGKILL)
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(10)
        # All that this rig's agents started, known or not: a pager left behind would be a stranger to the next test.
        wait_for("the end of the pagers", lambda: not self._kill_pagers(), seconds=10)
        shutil.rmtree(self.folder, ignore_errors=True)
