# SPDX-License-Identifier: Apache-2.0
"""Configuration: environment under flags, and what is refused with words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from frostline.controller.config import Settings
from frostline.controller.main import app


def test_environment_under_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_CONTROLLER_LEASE_SECONDS", "90")
    monkeypatch.setenv("FROSTLINE_CONTROLLER_HEARTBEAT_SECONDS", "3")
    settings = Settings(lease_seconds=60.0)
    assert settings.lease_seconds == 60.0
    assert settings.heartbeat_seconds == 3.0
    assert settings.timing().lease_seconds == 60.0


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("listen", "0.0.0.0:7443", "no TLS"),
        ("listen", "controller.example:7443", "no TLS"),
        ("listen", "[::]:7443", "no TLS"),
        ("listen", "7443", "port"),
        ("redis_url", "http://localhost", "no Redis URL"),
        ("metrics_listen", "unix:/run/x", "TCP only"),
        ("lease_seconds", 0.0, "greater than or equal"),
        ("lease_seconds", 14.0, "a third of lease_seconds"),
        ("log_format", "xml", "'json', 'console' or 'auto'"),
    ],
)
def test_refused(field: str, value: object, words: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(words)):
        Settings(**{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("listen", ["127.0.0.1:7443", "[::1]:0", "localhost:7443", "unix:/run/frostline/c.sock"])
def test_loopback_is_taken(listen: str) -> None:
    assert Settings(listen=listen).listen == listen


def test_wrong_flags_end_with_2_and_words() -> None:
    result = CliRunner().invoke(app, ["--listen", "0.0.0.0:7443", "--lease-seconds", "-1"])
    assert result.exit_code == 2
    assert "frostline-controller: listen: 0.0.0.0:7443 can be reached from other machines" in result.output
    assert "frostline-controller: lease_seconds:" in result.output


def test_every_setting_has_a_flag() -> None:
    flags = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "300", "NO_COLOR": "1"}).output
    for name in Settings.model_fields:
        assert f"--{name.replace('_', '-')}" in flags


def test_every_setting_is_documented_with_its_default() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "controller.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `([a-z_]+)` \| ([^|]+) \|", page, re.MULTILINE))
    assert list(table) == list(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        if isinstance(field.default, (float, str)) and not isinstance(field.default, bool):
            shown = f"{field.default:g}" if isinstance(field.default, float) else field.default
            assert table[name].strip("` ") == (shown or "-"), name


def test_data_folder_that_cannot_be_made_ends_with_1(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    arguments = ["--listen", f"unix:{tmp_path}/c.sock", "--data-dir", str(blocked), "--metrics-listen", "127.0.0.1:0"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
