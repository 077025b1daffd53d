# SPDX-License-Identifier: Apache-2.0
"""Frostline's daemons as real processes: started, ended, killed, and their logs read."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import redis

MIB: Final = 1 << 20
POLL_SECONDS: Final = 0.05
READY_SECONDS: Final = 40.0
END_SECONDS: Final = 20.0
LAST_LINES: Final = 12


class WorldError(RuntimeError):
    """Something of a world failed; the text says what, and where the logs are."""


class Daemon:
    """One process that logs to a file, in a session of its own: a ^C at the terminal is for us to act on."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name: Final = name
        self.log: Final = log
        self._command: Final = list(command)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        if self.process is None:
            raise WorldError(f"{self.name} is not started")
        return self.process.pid

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start the process and wait until it is ready."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("FROSTLINE_", "OTEL_"))}
        since = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**environment, "NO_COLOR": "1"},
                start_new_session=True,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self._ready(since):
            code = self.process.poll()
            if code is not None:
                raise WorldError(f"{self.name} ended at once with {code}; {self.words()}")
            if time.monotonic() > deadline:
                raise WorldError(f"{self.name} is not ready after {READY_SECONDS:g} s; {self.words()}")
            time.sleep(POLL_SECONDS)

    def _ready(self, since: int) -> bool:
        return True

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(END_SECONDS)

    def stop(self) -> int | None:
        """SIGTERM, and SIGKILL if that is not enough. Gives the exit code; None if it never ran."""
        if self.process is None:
            return None
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        try:
            return self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            return self.process.returncode

    def entries(self, event: str, since: int = 0) -> list[dict[str, Any]]:
        """JSON log lines with that event, from a byte offset of the log on."""
        if not self.log.exists():
            return []
        found = []
        for line in self.log.read_bytes()[since:].splitlines():
            with contextlib.suppress(ValueError):
                said = json.loads(line)
                if isinstance(said, dict) and said.get("event") == event:
                    found.append(said)
        return found

    def words(self) -> str:
        """The end of the log, and where the rest is."""
        lines = self.log.read_text(errors="replace").splitlines()[-LAST_LINES:] if self.log.exists() else []
        return f"log {self.log} ends with:\n" + ("\n".join(f"  | {line[:400]}" for line in lines) or "  | (nothing)")


class RedisDaemon(Daemon):
    """A redis-server on a unix socket; it keeps nothing, so a restart has lost everything."""

    def __init__(self, folder: Path, logs: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.socket: Final = folder / "redis.sock"
        self.url: Final = f"unix://{self.socket}"
        command = ["redis-server", "--port", "0", "--unixsocket", str(self.socket), "--dir", str(folder)]
        super().__init__("redis-server", [*command, "--save", "", "--appendonly", "no"], logs / "redis.log")

    def client(self) -> redis.Redis:
        return redis.Redis(unix_socket_path=str(self.socket), decode_responses=True, socket_timeout=5)

    def _ready(self, since: int) -> bool:
        try:
            with contextlib.closing(self.client()) as client:
                return bool(client.ping())
        except redis.exceptions.RedisError:
            return False


class ControllerDaemon(Daemon):
    """frostline-controller; without a Redis URL it starts its own redis-server."""

    def __init__(self, folder: Path, logs: Path, *options: str) -> None:
        self.address: Final = f"unix:{folder / 'c.sock'}"
        command = [sys.executable, "-m", "frostline.controller.main", "--listen", self.address]
        command += ["--data-dir", str(folder / "data"), "--metrics-listen", "127.0.0.1:0", "--log-format", "json"]
        super().__init__("frostline-controller", [*command, *options], logs / "controller.log")

    def _ready(self, since: int) -> bool:
        return bool(self.entries("controller ready", since))


class AgentDaemon(Daemon):
    """frostline-agent with a run folder of its own. Its pagers outlive it: ``end_pagers`` when all is over."""

    def __init__(self, node_id: str, folder: Path, logs: Path, controller: str, limits: Path, *options: str) -> None:
        self.node_id: Final = node_id
        self.run_dir: Final = folder / node_id
        self.limits: Final = limits
        command = [sys.executable, "-m", "frostline.agent.main", "run", "--controller", controller]
        command += ["--node-id", node_id, "--run-dir", str(self.run_dir), "--limits", str(limits)]
        command += ["--metrics-listen", "127.0.0.1:0", "--log-format", "json"]
        super().__init__(f"frostline-agent {node_id}", [*command, *options], logs / f"agent-{node_id}.log")

    def _ready(self, since: int) -> bool:
        return bool(self.entries("the agent runs", since))

    def pagers(self) -> dict[int, int]:
        """Pid of every pager that was started with this run folder, by the pid of its VMM."""
        found = {}
        marker = str(self.run_dir / "pagers").encode()
        for entry in os.scandir("/proc"):
            if not entry.name.isdecimal():
                continue
            with contextlib.suppress(OSError, ValueError):
                argv = Path(entry.path, "cmdline").read_bytes().split(b"\0")
                if b"--socket" in argv and argv[argv.index(b"--socket") + 1].startswith(marker):
                    found[int(argv[argv.index(b"--pid") + 1])] = int(entry.name)
        return found

    def end_pagers(self) -> None:
        """Pagers end with their VMs; whichever does not is ended here."""
        deadline = time.monotonic() + 3
        while self.pagers() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        for pid in self.pagers().values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
