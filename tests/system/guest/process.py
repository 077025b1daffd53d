# SPDX-License-Identifier: Apache-2.0
"""Starting and ending one QEMU process, with its console and its control connection."""

import os
import socket
import subprocess
import threading
from pathlib import Path

from .config import GuestConfig
from .console import Console
from .errors import GuestError
from .initramfs import guest_initramfs
from .kernel import guest_kernel
from .qmp import QmpClient

_QUIT_LIMIT_SECONDS = 5
_KILL_LIMIT_SECONDS = 20
_ENDING_LIMIT_SECONDS = 2
_STDERR_SHOWN_BYTES = 2000


class QemuProcess:
    """A running QEMU. Start it from the main thread: it ends with the thread that started it.

    Console and control are connected socket pairs, so there is no path to be too long, to be in the way or to
    be out of reach for the user that QEMU runs as. Files kept in `folder`: console.log, qemu.log.
    """

    def __init__(self, config: GuestConfig, accelerator: str, folder: Path) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise GuestError("start a guest from the main thread: QEMU is told to end with the thread that started it")
        folder.mkdir(parents=True, exist_ok=True)
        self._log = folder / "qemu.log"
        kernel = guest_kernel()
        # Handed over open: the cache may lie below a folder that the user QEMU runs as cannot enter.
        files = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in (kernel.image, guest_initramfs(kernel))]
        image, initramfs = (Path(f"/proc/self/fd/{descriptor}") for descriptor in files)
        launcher = ["setpriv", "--pdeathsig", "KILL"]
        if config.run_as_nobody:
            # Who it runs as before QEMU's first instruction: all of its threads and files are nobody's.
            launcher += ["--reuid=nobody", "--regid=nogroup", "--clear-groups"]
            launcher += ["--inh-caps=-all", "--bounding-set=-all"]
        ours, theirs = zip(socket.socketpair(), socket.socketpair(), strict=True)
        command = config.arguments(accelerator, image, initramfs, theirs[0].fileno(), theirs[1].fileno())
        try:
            with self._log.open("ab") as log:
                self.process = subprocess.Popen(
                    [*launcher, "--", *command],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[*files, theirs[0].fileno(), theirs[1].fileno()],
                    start_new_session=True,  # a ^C at the terminal is for us to act on, in our order
                )
        except OSError as error:
            for end in ours:
                end.close()
            raise GuestError(f"cannot start {launcher[0]}: {error}; install util-linux") from error
        finally:
            for end in theirs:
                end.close()
            for descriptor in files:
                os.close(descriptor)
        self.console = Console(ours[0], folder / "console.log")
        self.qmp = QmpClient(ours[1])

    def alive(self) -> bool:
        return self.process.poll() is None

    def stderr(self) -> str:
        """The end of what QEMU itself said."""
        return self._log.read_bytes()[-_STDERR_SHOWN_BYTES:].decode(errors="replace").strip()

    def describe(self) -> str:
        """State, QEMU's words and the last console lines: what a failure's text should carry."""
        try:
            # A console that has just closed is QEMU about to end.
            code = self.process.wait(_ENDING_LIMIT_SECONDS if self.console.closed else 0)
        except subprocess.TimeoutExpired:
            code = None
        state = "runs" if code is None else f"ended with {code}"
        said = f"QEMU (pid {self.process.pid}) {state}; its messages: {self.stderr() or 'none'}"
        return f"{said}\n{self.console.last_lines()}"

    def end(self) -> None:
        """End QEMU: by request, and if it does not follow (vCPUs waiting for pages), by SIGKILL. Never raises."""
        if self.alive():
            try:
                self.qmp.execute("quit", timeout_seconds=_QUIT_LIMIT_SECONDS)
                self.process.wait(_QUIT_LIMIT_SECONDS)
            except (GuestError, subprocess.TimeoutExpired):
                self.process.kill()
        try:
            self.process.wait(_KILL_LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            os.write(2, f"qemu (pid {self.process.pid}) does not end after SIGKILL\n".encode())
        self.console.close()
        self.qmp.close()
