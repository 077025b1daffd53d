# SPDX-License-Identifier: Apache-2.0
"""The agent's settings: command line first, then environment (FROSTLINE_AGENT_...), then these defaults."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from frostline.agent.trackers import parse_trackers
from frostline.native import Tracker
from frostline.wire.units import parse_duration

ENVIRONMENT_PREFIX: Final = "FROSTLINE_AGENT_"
# sockaddr_un takes 107 bytes of path; a pager's socket is <run-dir>/pagers/<pid>-<start time>.sock.
MAX_RUN_DIR_BYTES: Final = 60


def _seconds(value: object) -> float:
    """``500ms``, ``2m``, or a bare number of seconds: the environment has only text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"{value!r} is not a duration")
    if isinstance(value, str) and value.replace(".", "", 1).isdecimal():
        value = float(value)
    return parse_duration(value)


def _short_enough(path: Path) -> Path:
    absolute = path.absolute()
    if len(str(absolute).encode()) > MAX_RUN_DIR_BYTES:
        raise ValueError(f"{absolute} is too long for unix sockets in it; use at most {MAX_RUN_DIR_BYTES} bytes")
    return absolute


_Seconds = Annotated[float, BeforeValidator(_seconds)]
# NoDecode: in the environment it is `rwp,zap`, as on the command line, and no JSON.
_Trackers = Annotated[Annotated[tuple[Tracker, ...], BeforeValidator(parse_trackers)] | None, NoDecode]


class AgentSettings(BaseSettings):
    """docs/agent.md has this as a table; a test holds them together."""

    model_config = SettingsConfigDict(env_prefix=ENVIRONMENT_PREFIX, extra="forbid", frozen=True)

    node_id: str = Field(
        default_factory=socket.gethostname, min_length=1, max_length=253, description="name of this host in the fleet"
    )
    controller: str = Field(default="", description="address of the controller: host:port or unix:path")
    run_dir: Annotated[Path, AfterValidator(_short_enough)] = Field(
        default=Path("/run/frostline"), description="sockets, pagers' logs, lock; one agent for each"
    )
    state_dir: Path | None = Field(default=None, description="where the epoch fence is kept; default: the run folder")
    limits: Path | None = Field(
        default=None, description="local limits file; default /etc/frostline/limits.yaml if there"
    )
    policy: Path | None = Field(default=None, description="standalone: the policy file")
    pager: Path | None = Field(default=None, description="frostline-pager to start; default: the installed one")
    pager_log: Literal["file", "stderr"] = Field(default="file", description="where pagers log to")
    trackers: _Trackers = Field(
        default=None, description="trackers in order of preference; default: the limits file's, else auto"
    )
    discovery_interval: Annotated[_Seconds, Field(ge=0.1, le=60)] = Field(
        default=2.0, description="between looks for VMs, statuses and records"
    )
    report_interval: Annotated[_Seconds, Field(ge=0.2, le=600)] | None = Field(
        default=None, description="between reports; default: what the controller says (standalone: 10s)"
    )
    attach_grace: Annotated[_Seconds, Field(ge=0, le=3600)] = Field(
        default=15.0, description="how long a new VM waits for the policy's word before it is observed unasked"
    )
    drain_after: Annotated[_Seconds, Field(ge=1)] = Field(
        default=3600.0, description="without a controller for this long, pages come back if RAM allows"
    )
    detach_on_exit: bool = Field(default=False, description="on SIGTERM bring everything back and detach all")
    detach_timeout: Annotated[_Seconds, Field(ge=1, le=86400)] = Field(
        default=300.0, description="how long --detach-on-exit may take"
    )
    metrics_listen: str = Field(default="127.0.0.1:9465", description="Prometheus endpoint; empty: none")
    otlp_endpoint: str = Field(default="", description="OTLP gRPC receiver for traces; empty: none")
    trace_console: bool = Field(default=False, description="write each span as a line to stderr")
    log_format: Literal["json", "console", "auto"] = Field(default="auto", description="auto: console on a terminal")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")
    insecure_off_loopback: bool = Field(default=False, description="allow plain text to other hosts")

    @property
    def state_path(self) -> Path:
        return (self.state_dir or self.run_dir) / "state.json"

    @property
    def admin_path(self) -> Path:
        return self.run_dir / "admin.sock"
