# SPDX-License-Identifier: Apache-2.0
"""What can be configured: FROSTLINE_CONTROLLER_* in the environment, flags over it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from frostline.controller.session.hub import Timing
from frostline.wire.channels import parse_address


def _default_data_dir() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/frostline/controller")
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local/state")
    return Path(base) / "frostline/controller"


def _check_listen(text: str) -> str:
    address = parse_address(text)
    if not address.is_loopback:
        raise ValueError(
            f"{text} can be reached from other machines, and this version has no TLS: anybody there could change the "
            "policy; listen on 127.0.0.1, [::1] or unix:/path"
        )
    return text


def _check_metrics(text: str) -> str:
    if text:
        address = parse_address(text)
        if address.path is not None:
            raise ValueError(
                f"{text} is a unix socket, and Prometheus scrapes TCP only; write host:port, port 0 for any"
            )
    return text


def _check_redis(url: str) -> str:
    if url and urlsplit(url).scheme not in ("redis", "rediss", "unix"):
        raise ValueError(f"{url!r} is no Redis URL; write redis://host:6379/0, rediss://... or unix:///path")
    return url


class Settings(BaseSettings):
    """Every field can be given in the environment as FROSTLINE_CONTROLLER_<NAME>."""

    model_config = SettingsConfigDict(env_prefix="FROSTLINE_CONTROLLER_", extra="forbid", frozen=True)

    listen: Annotated[str, AfterValidator(_check_listen)] = "127.0.0.1:7443"
    redis_url: Annotated[str, AfterValidator(_check_redis)] = ""
    data_dir: Path = Field(default_factory=_default_data_dir)
    metrics_listen: Annotated[str, AfterValidator(_check_metrics)] = "127.0.0.1:9464"
    otlp_endpoint: str = ""
    trace_console: bool = False
    log_format: Literal["json", "console", "auto"] = "auto"
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    heartbeat_seconds: float = Field(default=10.0, ge=0.1, le=300.0)
    report_seconds: float = Field(default=60.0, ge=0.1, le=3600.0)
    lease_seconds: float = Field(default=180.0, ge=0.5, le=600.0)
    decide_seconds: float = Field(default=5.0, ge=0.05, le=60.0)
    ack_seconds: float = Field(default=15.0, ge=0.5, le=300.0)
    streams_per_second: float = Field(default=50.0, ge=1.0, le=10_000.0)

    @model_validator(mode="after")
    def _lease_can_be_renewed(self) -> Self:
        """Renewals are due at a third of the lease, and are noticed at the next tick."""
        if self.decide_seconds > self.lease_seconds / 3:
            raise ValueError(
                f"decide_seconds {self.decide_seconds:g} is more than a third of lease_seconds {self.lease_seconds:g}: "
                "leases would run out between two looks at them"
            )
        return self

    def timing(self) -> Timing:
        return Timing(
            heartbeat_seconds=self.heartbeat_seconds,
            report_seconds=self.report_seconds,
            lease_seconds=self.lease_seconds,
            decide_seconds=self.decide_seconds,
            ack_seconds=self.ack_seconds,
            streams_per_second=self.streams_per_second,
        )
