# SPDX-License-Identifier: Apache-2.0
"""A running operator service, and the command run against it as an operator's shell would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from frostline.controller.cli.main import app
from tests.unit.cli.servicer import RunningServer, fill


@dataclass(frozen=True)
class Run:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def error(self) -> dict[str, Any]:
        found = json.loads(self.err)["error"]
        assert isinstance(found, dict)
        return found


Command = Callable[..., Run]


@pytest.fixture
def server() -> Iterator[RunningServer]:
    # pytest's own folders are too deep for the path of a unix socket.
    with tempfile.TemporaryDirectory(prefix="fl-cli-") as folder, RunningServer(Path(folder)) as running:
        fill(running.servicer)
        yield running


@pytest.fixture
def frostline(server: RunningServer) -> Command:
    """The command inside this process: quick, but stdout is no terminal and signals are not its own."""

    def run(*arguments: str, stdin: str | bytes | None = None, width: int = 120, **environ: str) -> Run:
        settings: dict[str, str | None] = {
            "FROSTLINE_CONTROLLER": server.address,
            "COLUMNS": str(width),
            "LC_ALL": None,
            "LANG": "C.UTF-8",
            "NO_COLOR": None,
            **environ,
        }
        result = CliRunner().invoke(app, list(arguments), input=stdin, env=settings)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Run(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def frostline_process(server: RunningServer) -> Callable[..., subprocess.Popen[bytes]]:
    """The command as its own process, for what only a process has: signals, a terminal, a locale."""

    def start(
        *arguments: str, stdout: int = subprocess.PIPE, stderr: int = subprocess.PIPE, **environ: str
    ) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "frostline"), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, "FROSTLINE_CONTROLLER": server.address, "COLUMNS": "100", **environ},
        )

    return start
