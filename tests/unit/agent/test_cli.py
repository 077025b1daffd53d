# SPDX-License-Identifier: Apache-2.0
"""The command line before it does anything: what is missing or wrong is said, with exit code 2."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from frostline.agent.cli.commands import app


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run"], "--controller ADDRESS"),
        (["run", "--controller", "nowhere"], "has no port"),
        (["run", "--controller", "192.0.2.1:7443"], "--insecure-off-loopback"),
        (["standalone"], "--policy FILE"),
        (["standalone", "--policy", "x", "--discovery-interval", "1ms"], "--discovery-interval"),
        (["standalone", "--policy", "x", "--report-interval", "soon"], "--report-interval"),
        (["standalone", "--policy", "x", "--log-format", "xml"], "--log-format"),
        (["standalone", "--policy", "x", "--run-dir", "/run/" + "d" * 100], "--run-dir"),
        (
            ["standalone", "--policy", "x", "--trackers", "zap,sap"],
            "--trackers: 'sap' is no tracker; there are rwp",
        ),
        (["standalone", "--policy", "x", "--trackers", "zap,zap"], "--trackers: 'zap' is in the list twice"),
        (["standalone", "--policy", "x", "--trackers", ""], "--trackers: the list is empty"),
        (["status", "--run-dir", "/run/" + "d" * 100], "--run-dir"),
    ],
)
def test_bad_usage(arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_AGENT_METRICS_LISTEN", "")
    run_dir = [] if "--run-dir" in arguments else ["--run-dir", "/run/frostline-of-a-test"]
    result = CliRunner().invoke(app, [*arguments, *run_dir])
    assert result.exit_code == 2 and says in result.output


def test_the_environment_gives_what_the_command_line_leaves_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FROSTLINE_AGENT_RUN_DIR", "/run/from-the-environment")
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 4 and "/run/from-the-environment/admin.sock" in result.output
    monkeypatch.setenv("FROSTLINE_AGENT_TRACKERS", "zap, none")
    result = CliRunner().invoke(app, ["standalone", "--policy", "x"])
    assert result.exit_code == 2 and "--trackers: 'none' is no tracker" in result.output


@pytest.mark.parametrize(
    "command", ["run", "standalone", "probe", "status", "vms", "drain", "detach", "resume", "release"]
)
def test_every_command_has_help_with_the_exit_codes(command: str) -> None:
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0 and "Exit codes: 0 done" in " ".join(result.output.split())
