# SPDX-License-Identifier: Apache-2.0
"""Starting pagers and learning how they ended, with small programs in the pager's place."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from pathlib import Path

import pytest

from frostline.agent.pager import (
    MAX_LOG_BYTES,
    PagerOptions,
    adopt_pager,
    last_refusal,
    rotate_log,
    start_pager,
    trim_log,
)
from frostline.agent.processes import ProcessWatch
from frostline.agent.procfs import ProcessId, process_id
from frostline.native import Refusal, Tracker

VMM = ProcessId(4711, 1000)


def program(folder: Path, body: str) -> PagerOptions:
    path = folder / "pager"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    (folder / "log").mkdir(exist_ok=True)
    return PagerOptions(program=path, socket_dir=folder, log_dir=folder / "log")


async def ended(options: PagerOptions) -> tuple[int | None, Refusal, str]:
    gone = asyncio.Event()
    pager = start_pager(options, VMM, gone.set)
    async with asyncio.timeout(10):
        await gone.wait()
    ending = pager.ending()
    return ending.code, ending.refusal, ending.detail


async def test_a_refusal_comes_with_code_and_the_pagers_own_sentence(tmp_path: Path) -> None:
    refused = '{"event":"refused","refusal":"traced","detail":"gdb (pid 7) traces it"}'
    options = program(tmp_path, f"echo starting >&2; echo '{refused}' >&2; exit 72")
    assert await ended(options) == (72, Refusal.TRACED, "gdb (pid 7) traces it")


async def test_other_endings(tmp_path: Path) -> None:
    assert (await ended(program(tmp_path, "exit 66")))[1] is Refusal.NOT_SHARED_MEMFD
    assert (await ended(program(tmp_path, "kill -9 $$")))[2] == "killed by signal 9"
    code, refusal, detail = await ended(program(tmp_path, "exit 4"))
    assert (code, refusal) == (4, Refusal.NONE) and ".log" in detail
    assert "versions" in (await ended(program(tmp_path, "exit 2")))[2]


async def test_a_pager_has_a_session_of_its_own_and_no_stdin(tmp_path: Path) -> None:
    body = 'read line && exit 9; echo "{\\"args\\":\\"$*\\"}" >&2; exec sleep 60'
    gone = asyncio.Event()
    pager = start_pager(program(tmp_path, body), VMM, gone.set)
    assert os.getsid(pager.pid) == pager.pid and not pager.adopted
    pager.watch.send_signal(signal.SIGKILL)
    async with asyncio.timeout(10):
        await gone.wait()
    pager.ending()
    log = (tmp_path / "log" / "4711-1000.log").read_text()
    assert f"--pid 4711 --socket {tmp_path}/4711-1000.sock" in log or pager.gone


def test_options_reach_the_command_line(tmp_path: Path) -> None:
    options = PagerOptions(Path("/p"), tmp_path, None, 3, 500, 1 << 30, 25, 1500, "debug")
    argv = options.argv(VMM)
    assert argv[1:5] == ["--pid", "4711", "--socket", f"{tmp_path}/4711-1000.sock"]
    pairs = dict(zip(argv[1::2], argv[2::2], strict=True))
    assert pairs["--fault-threads"] == "3" and pairs["--scan-interval-ms"] == "500"
    assert pairs["--pool-max-bytes"] == str(1 << 30) and pairs["--stall-target-permille"] == "25"
    assert pairs["--longest-io-ms"] == "1500"
    assert pairs["--trackers"] == "auto"
    chosen = PagerOptions(Path("/p"), tmp_path, None, trackers=(Tracker.IDLE, Tracker.ZAP)).argv(VMM)
    assert chosen[chosen.index("--trackers") + 1] == "idle,zap"
    assert pairs["--log-level"] == "debug"
    assert "--fault-threads" not in PagerOptions(Path("/p"), tmp_path, None).argv(VMM)


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    async def start() -> None:
        start_pager(PagerOptions(tmp_path / "none", tmp_path, None), VMM, lambda: None)

    with pytest.raises(FileNotFoundError):
        asyncio.run(start())


async def test_the_end_of_a_process_that_is_no_child_is_seen(tmp_path: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    gone = asyncio.Event()
    pager = adopt_pager(child.pid, gone.set)
    assert pager is not None and pager.adopted and not pager.gone
    child.kill()
    async with asyncio.timeout(10):
        await gone.wait()
    assert pager.ending().code is None
    child.wait(10)
    assert adopt_pager(child.pid, gone.set) is None


async def test_a_reused_pid_is_gone_at_once() -> None:
    me = process_id(os.getpid())
    assert me is not None
    gone = asyncio.Event()
    ProcessWatch(ProcessId(me.pid, me.start_time_ticks + 1), gone.set)
    async with asyncio.timeout(10):
        await gone.wait()


def test_logs_do_not_grow_without_end(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b"a" * (MAX_LOG_BYTES + 1))
    rotate_log(path)
    assert not path.exists() and (tmp_path / "x.log.1").stat().st_size == MAX_LOG_BYTES + 1
    path.write_bytes(b"a" * (2 * MAX_LOG_BYTES + 1))
    trim_log(path)
    assert path.stat().st_size == 0
    trim_log(tmp_path / "none.log")
    rotate_log(tmp_path / "none.log")


def test_garbage_in_a_log_is_no_refusal(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    path.write_bytes(b'\xff\xfe{]\n{"event":"serving"}\n\n')
    assert last_refusal(path) == {} and last_refusal(None) == {} and last_refusal(tmp_path / "none") == {}
