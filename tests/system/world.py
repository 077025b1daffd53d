# SPDX-License-Identifier: Apache-2.0
"""A small fleet of real processes: Redis, a controller, agents with their pagers, and guests.

Everything lives in one folder of its own (sockets short enough, logs kept on request), listens on unix sockets and
port 0 only, and is ended by pid. Agents are told by their limits file to touch nothing but this world's guests,
whatever else runs on the machine.
"""

from __future__ import annotations

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
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import grpc

from frostline.native import NativeError, Status, View
from frostline.v1 import operator_pb2, operator_pb2_grpc
from tests.system.daemons import MIB, POLL_SECONDS, AgentDaemon, ControllerDaemon, RedisDaemon, WorldError
from tests.system.guest import Guest, GuestConfig

__all__ = ["MIB", "Timing", "World", "WorldError", "until"]

Value = TypeVar("Value")
CLI_SECONDS: Final = 60.0
CALL_SECONDS: Final = 10.0


class Timing:
    """Everything faster than in production, so that a story fits into minutes. Seconds."""

    scan = 1.0
    report = 1.0
    heartbeat = 1.0
    lease = 12.0
    decide = 1.0
    discovery = 0.3


def until(what: str, wanted: Callable[[], Value], seconds: float, words: Callable[[], str] = lambda: "") -> Value:
    """What ``wanted`` gives once it is true. WorldError after ``seconds``, with ``words()``."""
    deadline = time.monotonic() + seconds
    while not (value := wanted()):
        if time.monotonic() > deadline:
            raise WorldError(f"not within {seconds:g} s: {what}\n{words()}".rstrip())
        time.sleep(POLL_SECONDS)
    return value


class World:
    """A context manager. Guests must be started from the main thread (they end with the thread that starts them)."""

    def __init__(self, *, keep_logs_in: Path | None = None, timing: type[Timing] = Timing, otlp: str = "") -> None:
        """Logs go to ``keep_logs_in`` and stay there; without it they go with the world."""
        self.folder: Final = Path(tempfile.mkdtemp(prefix="fl-"))
        self.logs: Final = keep_logs_in or self.folder / "log"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.timing: Final = timing
        self.redis: RedisDaemon | None = None
        self.agents: Final[dict[str, AgentDaemon]] = {}
        self.guests: Final[list[Guest]] = []
        self._otlp: Final = ["--otlp-endpoint", otlp] if otlp else []
        self._controller: ControllerDaemon | None = None
        self._stack: Final = ExitStack()
        self._views: Final[dict[int, View]] = {}
        self._operator: operator_pb2_grpc.OperatorServiceStub | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End everything, the VMs before their agents' pagers; SIGINT meanwhile is not acted on."""
        with contextlib.suppress(ValueError):  # not in the main thread: then there is no handler to change
            self._stack.callback(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, signal.SIG_IGN))
        for view in self._views.values():
            view.close()
        self._views.clear()
        agents = list(self.agents.values())
        for agent in agents:
            agent.stop()
        for guest in self.guests:
            guest.shutdown(graceful=False)
        for agent in agents:
            agent.end_pagers()
        if self._controller is not None:
            self._controller.stop()
        if self.redis is not None:
            self.redis.stop()
        self._stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    # --- parts ---

    def start_redis(self) -> RedisDaemon:
        """A Redis of the world's own; without it the controller starts a private one."""
        self.redis = RedisDaemon(self.folder / "redis", self.logs)
        self.redis.start()
        return self.redis

    @property
    def controller(self) -> ControllerDaemon:
        if self._controller is None:
            raise WorldError("the controller is not started")
        return self._controller

    def start_controller(self, *options: str) -> ControllerDaemon:
        timing = self.timing
        given = ["--heartbeat-seconds", f"{timing.heartbeat}", "--report-seconds", f"{timing.report}"]
        given += ["--lease-seconds", f"{timing.lease}", "--decide-seconds", f"{timing.decide}"]
        given += [*(["--redis-url", self.redis.url] if self.redis else []), *self._otlp, *options]
        self._controller = ControllerDaemon(self.folder, self.logs, *given)
        self._controller.start()
        return self._controller

    def start_agent(
        self, guests: Sequence[GuestConfig], node_id: str = "node-1", limits: dict[str, Any] | None = None
    ) -> AgentDaemon:
        """An agent that may touch these guests only. ``limits`` is put over the limits file's other keys."""
        path = self.folder / f"{node_id}.limits.yaml"
        document = {"version": 1, "allow_evict": True, "only": [each.uuid for each in guests]}
        document |= {"scan_interval": f"{self.timing.scan:g}s", **(limits or {})}
        path.write_text(json.dumps(document, indent=1))  # JSON is YAML
        path.chmod(0o600)
        interval = ["--discovery-interval", f"{self.timing.discovery:g}s", *self._otlp]
        agent = AgentDaemon(node_id, self.folder, self.logs, self.controller.address, path, *interval)
        self.agents[node_id] = agent
        agent.start()
        return agent

    def start_guest(self, config: GuestConfig) -> Guest:
        """Starts QEMU; booting and filling are not waited for."""
        guest = Guest(config, self.logs / f"guest-{config.name}")
        self.guests.append(guest)
        guest.start()
        return guest

    # --- what operators do and see ---

    def cli(self, *arguments: str, ok: Sequence[int] = (0,), seconds: float = CLI_SECONDS) -> dict[str, Any]:
        """Run `frostline ARGUMENTS --json` as an operator would and give back its JSON."""
        command = [str(Path(sys.executable).parent / "frostline"), *arguments, "--json"]
        done = subprocess.run(
            [*command, "--controller", self.controller.address],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            start_new_session=True,
        )
        if done.returncode not in ok:
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise WorldError(f"frostline {' '.join(arguments)}: exit {done.returncode}: {said}")
        return dict(json.loads(done.stdout)) if done.stdout.strip() else {}

    def agent_cli(self, agent: AgentDaemon, *arguments: str) -> str:
        """Run `frostline-agent ARGUMENTS` against that agent's admin socket."""
        command = [sys.executable, "-m", "frostline.agent.main", *arguments, "--run-dir", str(agent.run_dir)]
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=CLI_SECONDS,
            check=False,
            start_new_session=True,
        )
        if done.returncode:
            raise WorldError(f"frostline-agent {' '.join(arguments)}: exit {done.returncode}: {done.stderr[-2000:]}")
        return done.stdout

    def put_policy(self, document: dict[str, Any], comment: str = "") -> int:
        """Put a policy in force through the CLI; gives its version."""
        path = self.folder / "policy.yaml"
        path.write_text(json.dumps(document, indent=1))
        return int(self.cli("policy", "put", str(path), *(["--comment", comment] if comment else []))["version"])

    def vm(self, guest: Guest, seconds: float = CALL_SECONDS) -> operator_pb2.Vm | None:
        """What the controller says of a guest; None while it does not know it. grpc.RpcError when it is away."""
        if self._operator is None:
            channel = grpc.insecure_channel(self.controller.address)
            self._stack.callback(channel.close)
            self._operator = operator_pb2_grpc.OperatorServiceStub(channel)
        try:
            return self._operator.GetVm(operator_pb2.GetVmRequest(vm=guest.config.uuid), timeout=seconds).vm
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return None
            raise

    # --- what is true, whatever anybody says ---

    def status(self, guest: Guest) -> Status | None:
        """The guest's vault; None while it has none."""
        try:
            if guest.pid not in self._views:
                self._views[guest.pid] = View(guest.pid)
            return self._views[guest.pid].status()
        except NativeError:
            self.forget_view(guest)
            return None

    def forget_view(self, guest: Guest) -> None:
        """After a detach: the next look finds the new vault, or none."""
        view = self._views.pop(guest.pid, None)
        if view is not None:
            view.close()

    def words(self) -> str:
        """The ends of the daemons' logs, for a failure's text."""
        parts = [self._controller, self.redis, *self.agents.values()]
        return "\n".join(part.words() for part in parts if part is not None)


def kill_pid(pid: int) -> bool:
    """kill -9; False when the process is gone already."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True
