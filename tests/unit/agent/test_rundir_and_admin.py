# SPDX-License-Identifier: Apache-2.0
"""The run folder's lock and owner, and the admin socket's manners."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frostline.agent.admin import MAX_LINE_BYTES, AdminError, AdminRequest, AdminServer, ask
from frostline.agent.rundir import RunDir, RunDirError


def test_a_second_agent_is_refused_and_told_by_whom(tmp_path: Path) -> None:
    first = RunDir(tmp_path / "run")
    with pytest.raises(RunDirError, match=rf"another agent \(pid {os.getpid()}\)"):
        RunDir(tmp_path / "run")
    first.close()
    RunDir(tmp_path / "run").close()


def test_a_dead_agents_lock_is_free(tmp_path: Path) -> None:
    code = (
        f"from frostline.agent.rundir import RunDir; from pathlib import Path; RunDir(Path({str(tmp_path / 'run')!r}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    RunDir(tmp_path / "run").close()


def test_folders_are_for_their_owner_only(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    for folder in (run_dir.path, run_dir.sockets, run_dir.logs):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    run_dir.close()
    os.chmod(tmp_path / "run", 0o777)
    with pytest.raises(RunDirError, match="could command pagers"):
        RunDir(tmp_path / "run")


def test_a_link_or_a_file_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(RunDirError):
        RunDir(tmp_path / "link")
    (tmp_path / "file").touch()
    with pytest.raises(RunDirError):
        RunDir(tmp_path / "file")


async def answer(request: AdminRequest) -> dict[str, Any]:
    if request.vm == "ghost":
        raise AdminError("not_found", "there is no VM 'ghost' on this host")
    return {"method": request.method, "vm": request.vm}


async def raw(path: Path, line: bytes) -> dict[str, Any]:
    reader, writer = await asyncio.open_unix_connection(str(path))
    writer.write(line)
    await writer.drain()
    async with asyncio.timeout(10):
        said = await reader.readline()
    writer.close()
    return dict(json.loads(said))


async def test_the_admin_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    server = AdminServer(path, answer)
    await server.start()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert (await ask(path, AdminRequest(method="drain", vm="web")))["vm"] == "web"
    with pytest.raises(AdminError, match="no VM 'ghost'") as caught:
        await ask(path, AdminRequest(method="drain", vm="ghost"))
    assert caught.value.code == "not_found"
    for line in (b"nonsense\n", b"{}\n", b'{"method":"format"}\n', b'{"method":"status","more":1}\n', b"[1]\n"):
        assert (await raw(path, line))["code"] == "invalid"
    too_long = await raw(path, b"x" * (MAX_LINE_BYTES + 10) + b"\n")
    assert too_long["code"] == "invalid" and str(MAX_LINE_BYTES) in too_long["message"]
    await server.stop()
    assert not path.exists()
    with pytest.raises(AdminError) as gone:
        await ask(path, AdminRequest(method="status"))
    assert gone.value.code == "unreachable"


async def test_a_socket_left_by_a_dead_agent_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    code = f"import socket; s = socket.socket(socket.AF_UNIX); s.bind({str(path)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert path.exists()
    server = AdminServer(path, answer)
    await server.start()
    assert (await ask(path, AdminRequest(method="status")))["ok"]
    await server.stop()


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
async def test_other_users_are_denied_even_when_they_can_reach_the_socket(tmp_path: Path) -> None:
    path = tmp_path / "admin.sock"
    server = AdminServer(path, answer)
    await server.start()
    os.chmod(path, 0o666)
    for folder in (tmp_path, *tmp_path.parents[:-1]):
        if folder != Path("/tmp"):
            os.chmod(folder, 0o755)
    code = (
        "import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX); "
        f's.connect({str(path)!r}); s.sendall(b\'{{"method":"status"}}\\n\'); print(s.recv(4096).decode())'
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    async with asyncio.timeout(30):
        said, _ = await process.communicate()
    await server.stop()
    assert json.loads(said)["code"] == "denied"
