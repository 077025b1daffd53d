# SPDX-License-Identifier: Apache-2.0
"""A redis-server of our own, on a unix socket in our data folder: for one machine, a demo, a test."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from urllib.parse import quote

import structlog

from frostline.controller.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)

START_SECONDS = 10.0
STOP_SECONDS = 10.0
LOCK_SECONDS = 10.0
RESTARTS = 5
RESTART_WINDOW_SECONDS = 60.0
RESTART_PAUSE_SECONDS = 30.0
MAX_MEMORY = "512mb"
_MAX_SOCKET_PATH = 100

# Makes the kernel end redis-server when we die, and notices if we died before it could say so.
_LAUNCHER = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the controller is gone already")
os.execv(sys.argv[2], sys.argv[2:])
"""


class PrivateRedisError(Exception):
    """Why there is no private Redis, and what to do."""


class PrivateRedis:
    """Starts, watches and ends one redis-server. The data folder is locked for as long as either of us lives."""

    def __init__(self, data_dir: Path, metrics: Metrics) -> None:
        self._folder = data_dir / "redis"
        self._metrics = metrics
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._lock_fd = -1
        self._short_folder: str | None = None
        self.socket = self._folder / "redis.sock"

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """PrivateRedisError when it cannot be started."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise PrivateRedisError(
                f"cannot make the folder {self._folder} for the private Redis: {error.strerror}; "
                "give another one with --data-dir, or a Redis with --redis-url"
            ) from error
        if len(os.fsencode(self.socket)) > _MAX_SOCKET_PATH:
            # The kernel takes 107 bytes for a socket's path; a data folder may well be deeper.
            self._short_folder = tempfile.mkdtemp(prefix="frostline-")
            self.socket = Path(self._short_folder) / "redis.sock"
        await self._lock()
        try:
            await self._launch()
        except PrivateRedisError:
            await self.stop()
            raise
        self._watcher = asyncio.create_task(self._watch(), name="private Redis")

    async def stop(self) -> None:
        """End it in good order, then let go of the folder."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.gather(self._watcher, return_exceptions=True)
            self._watcher = None
        await self._end_process()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1
        if self._short_folder is not None:
            shutil.rmtree(self._short_folder, ignore_errors=True)
            self._short_folder = None

    async def _end_process(self) -> None:
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        # redis-server writes everything out on SIGTERM.
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            _log.error("private Redis did not end in time and is killed", pid=process.pid, seconds=STOP_SECONDS)
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _lock(self) -> None:
        """Two servers on one append-only file would destroy it. The server inherits the lock, and so holds it on."""
        path = self._folder / "lock"
        self._lock_fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + LOCK_SECONDS
        while True:
            try:
                fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(self._lock_fd)
                    self._lock_fd = -1
                    raise PrivateRedisError(
                        f"another controller (or its Redis) uses {self._folder}; "
                        "stop it, or give this one another --data-dir"
                    ) from None
            await asyncio.sleep(0.1)

    async def _launch(self) -> None:
        program = shutil.which("redis-server")
        if program is None:
            raise PrivateRedisError(
                "redis-server is not installed; install it (Debian: apt install redis-server), "
                "or give the address of a running Redis with --redis-url"
            )
        log_path = self._folder / "redis.log"
        with contextlib.suppress(FileNotFoundError):
            self.socket.unlink()
        arguments = [program, "--port", "0", "--unixsocket", str(self.socket), "--unixsocketperm", "600"]
        arguments += ["--dir", str(self._folder), "--daemonize", "no", "--logfile", str(log_path)]
        arguments += ["--loglevel", "warning", "--save", "", "--appendonly", "yes", "--appendfsync", "always"]
        arguments += ["--maxmemory", MAX_MEMORY, "--maxmemory-policy", "noeviction", "--databases", "1"]
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-I",
            "-c",
            _LAUNCHER,
            str(os.getpid()),
            *arguments,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            pass_fds=(self._lock_fd,),
            # A Ctrl-C is for us: we end it after the last write.
            start_new_session=True,
        )
        deadline = time.monotonic() + START_SECONDS
        while not await self._answers():
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise PrivateRedisError(f"the private Redis did not start: {_last_line(log_path)}; see {log_path}")
            await asyncio.sleep(0.02)
        _log.info("private Redis started", pid=self._process.pid, socket=str(self.socket), data=str(self._folder))

    async def _answers(self) -> bool:
        try:
            async with asyncio.timeout(1.0):
                reader, writer = await asyncio.open_unix_connection(str(self.socket))
        except (TimeoutError, OSError):
            return False
        try:
            writer.write(b"PING\r\n")
            # It answers -LOADING while it reads its data.
            async with asyncio.timeout(1.0):
                return (await reader.readline()).startswith(b"+PONG")
        except (TimeoutError, OSError):
            return False
        finally:
            writer.close()

    async def _watch(self) -> None:
        """Start it again when it dies, but not for ever as fast as it can die."""
        starts: deque[float] = deque(maxlen=RESTARTS)
        while True:
            if self._process is not None:
                status = await self._process.wait()
                _log.error("private Redis died", status=status, log=str(self._folder / "redis.log"))
            if len(starts) == RESTARTS and time.monotonic() - starts[0] < RESTART_WINDOW_SECONDS:
                _log.error("private Redis dies too often", pause_seconds=RESTART_PAUSE_SECONDS)
                await asyncio.sleep(RESTART_PAUSE_SECONDS)
            starts.append(time.monotonic())
            self._metrics.count("store.restarts")
            try:
                await self._launch()
            except (PrivateRedisError, OSError) as error:
                _log.error("private Redis not restarted", why=str(error))
                await self._end_process()


def _last_line(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 4096, 0))
            lines = file.read().decode("utf-8", "replace").strip().splitlines()
    except OSError:
        return "it left no log"
    return lines[-1][:400] if lines else "it left no log"
