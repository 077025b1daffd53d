# SPDX-License-Identifier: Apache-2.0
"""Exit codes and error messages: every code, and that each error says what was tried, on what, and what to do."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from frostline.controller.cli.exits import EXIT_MEANINGS, Exit
from tests.unit.cli.conftest import Command
from tests.unit.cli.servicer import RunningServer

Start = Callable[..., subprocess.Popen[bytes]]
DOCS = Path(__file__).parents[3] / "docs" / "cli.md"


def test_the_table_in_help_and_docs_is_the_code(frostline: Command) -> None:
    documented = dict(re.findall(r"^\| (\d+) \| (.+?) \|$", DOCS.read_text(), re.MULTILINE))
    assert documented == {str(int(code)): meaning for code, meaning in EXIT_MEANINGS.items()}
    assert set(EXIT_MEANINGS) == set(Exit)
    help_text = " ".join(frostline("--help").out.split())
    for code, meaning in EXIT_MEANINGS.items():
        assert f"{int(code)} {meaning}" in help_text


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["vms", "--nonsense"],
        ["vm"],
        ["vms", "--timeout", "10"],
        ["vms", "--timeout", "0s"],
        ["vms", "--controller", "nonsense"],
        ["vms", "--controller", "192.0.2.1:7443"],
        ["vms", "--controller", "127.0.0.1:0"],
        ["watch", "-i", "1ms"],
        ["watch", "-i", "soon"],
        ["policy", "list", "-n", "0"],
        ["policy", "get", "--", "-1"],
        ["policy", "put", "/nonexistent/policy.yaml"],
        ["freeze", "--host", "a", "--vm", "b"],
        ["unfreeze", "--host", "a", "--vm", "b"],
    ],
)
def test_usage_is_2(frostline: Command, server: RunningServer, arguments: list[str]) -> None:
    run = frostline(*arguments)
    assert (run.code, run.out) == (2, "")
    assert run.err
    assert not server.servicer.requests


@pytest.mark.parametrize("arguments", [["hosts"], ["vm", "x"], ["policy", "list"], ["freeze"], ["watch"]])
def test_nobody_there_is_3(frostline: Command, tmp_path: Path, arguments: list[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        run = frostline(*arguments, "--controller", address)
    assert (run.code, run.out) == (3, "")
    assert address in run.err and "Connection refused" in run.err and "is frostline-controller running" in run.err


def test_no_answer_in_time_is_3(frostline: Command, server: RunningServer) -> None:
    server.servicer.hang |= {"ListVms", "Watch"}
    for command in ("vms", "watch"):
        started = time.monotonic()
        run = frostline(command, "--timeout", "300ms")
        assert run.code == 3 and "no answer in time" in run.err and "--timeout" in run.err
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("code", "exit_code"),
    [
        (grpc.StatusCode.NOT_FOUND, 4),
        (grpc.StatusCode.INVALID_ARGUMENT, 5),
        (grpc.StatusCode.FAILED_PRECONDITION, 5),
        (grpc.StatusCode.PERMISSION_DENIED, 5),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, 5),
        (grpc.StatusCode.ABORTED, 6),
        (grpc.StatusCode.UNAVAILABLE, 7),
        (grpc.StatusCode.INTERNAL, 1),
    ],
)
def test_what_the_controller_says_has_its_code(
    frostline: Command, server: RunningServer, code: grpc.StatusCode, exit_code: int
) -> None:
    server.servicer.errors = dict.fromkeys(("Freeze", "PutPolicy"), (code, "the reason it gave", []))
    for arguments in (["freeze"], ["policy", "put", "-"]):
        run = frostline(*arguments, stdin="version: 1\n")
        assert (run.code, run.out) == (exit_code, "")
        assert "the reason it gave" in run.err and server.address in run.err
        error = frostline(*arguments, "--json", stdin="version: 1\n").error
        assert (error["exit_code"], error["said"]) == (exit_code, "the reason it gave")


def test_a_read_that_fails_while_the_store_is_there_is_no_store_error(
    frostline: Command, server: RunningServer
) -> None:
    server.servicer.errors["Watch"] = (grpc.StatusCode.UNAVAILABLE, "going away", [])
    assert frostline("watch").code == 3
    server.servicer.store_available = False
    assert frostline("watch").code == 7


def test_garbage_in_place_of_error_details_is_survived(frostline: Command, server: RunningServer) -> None:
    server.servicer.errors["PutPolicy"] = (grpc.StatusCode.INVALID_ARGUMENT, "bad", [("", "no place")])
    run = frostline("policy", "put", "-", stdin="x")
    assert run.code == 5 and "  document: no place" in run.err


def test_documents_that_cannot_be_read(frostline: Command, server: RunningServer, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"#" * (2**20 + 1))
    binary = tmp_path / "binary"
    binary.write_bytes(b"version: \xff\n")
    assert frostline("policy", "put", str(big)).code == 5
    run = frostline("policy", "put", str(binary))
    assert run.code == 5 and "byte 9 is not UTF-8" in run.err
    assert not server.servicer.requests


def test_a_fault_of_our_own_is_1_and_short(frostline_process: Start, server: RunningServer) -> None:
    server.servicer.vms[0].state.scan_interval_seconds = float("nan")
    # JSON has no NaN: the command must fail loudly rather than print what no parser reads.
    process = frostline_process("vm", "web-1", "--json")
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert json.loads(err)["error"]["kind"] == "unexpected"
    assert out == b""


def test_a_reader_that_leaves_is_no_drama(frostline_process: Start, server: RunningServer) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    process = frostline_process("vms", stdout=write_end)
    os.close(write_end)
    _out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (141, b"")


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_ctrl_c_ends_a_watch_cleanly(frostline_process: Start, extra: list[str]) -> None:
    process = frostline_process("watch", "-i", "200ms", *extra)
    assert process.stdout is not None
    assert process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (0, b"")


def test_ctrl_c_elsewhere_is_130(frostline_process: Start, server: RunningServer) -> None:
    server.servicer.hang.add("ListVms")
    process = frostline_process("vms")
    deadline = time.monotonic() + 20
    while not server.servicer.requests and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _out, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_watch_on_a_terminal_redraws_and_leaves_it_usable(frostline_process: Start) -> None:
    primary, secondary = pty.openpty()
    process = frostline_process("watch", "-i", "200ms", stdout=secondary, TERM="xterm", LANG="C.UTF-8")
    os.close(secondary)
    shown = b""
    deadline = time.monotonic() + 20
    while shown.count(b"away lately") < 3 and time.monotonic() < deadline:
        if select.select([primary], [], [], 0.5)[0]:
            shown += os.read(primary, 65536)
    assert shown.count(b"away lately") >= 3
    process.send_signal(signal.SIGINT)
    # Reading ends with EIO once the command has closed the other side.
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            if select.select([primary], [], [], 0.1)[0]:
                shown += os.read(primary, 65536)
    assert process.wait(10) == 0
    hidden, visible = shown.rfind(b"\x1b[?25l"), shown.rfind(b"\x1b[?25h")
    assert 0 <= hidden < visible
    assert b"\x1b[" in shown and b"web-1" in shown
    os.close(primary)


@pytest.mark.parametrize("locale", ["C.UTF-8", "C"])
def test_a_drain_on_a_terminal_shows_how_much_is_left(
    frostline_process: Start, server: RunningServer, locale: str
) -> None:
    server.servicer.drain_steps = 8
    primary, secondary = pty.openpty()
    process = frostline_process("drain", "web-1", "--wait", stderr=secondary, TERM="xterm", LC_ALL=locale)
    os.close(secondary)
    shown = b""
    deadline = time.monotonic() + 20
    with contextlib.suppress(OSError):  # EIO: the other side is closed
        while time.monotonic() < deadline:
            if select.select([primary], [], [], 0.1)[0]:
                shown += os.read(primary, 65536)
    os.close(primary)
    assert process.wait(10) == 0
    left = re.findall(r"(\d[\d.]* [KM]iB) still away", shown.decode())
    assert len(set(left)) >= 3
    assert shown.rfind(b"\x1b[?25l") < shown.rfind(b"\x1b[?25h")
    assert (locale == "C.UTF-8") == any(ord(char) > 127 for char in shown.decode())


@pytest.mark.parametrize(
    "environ", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}]
)
def test_a_locale_without_blocks_gets_ascii(
    frostline_process: Start, server: RunningServer, environ: dict[str, str]
) -> None:
    server.servicer.vms[0].identity.name = "wéb-1-名"
    process = frostline_process("vm", server.servicer.vms[0].identity.vm_id, **environ)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, b"")
    bars = out.decode("utf-8", "replace")
    assert "####" in bars and "++++" in bars and "====" in bars
    assert not set("█▒■·→…") & set(bars)
