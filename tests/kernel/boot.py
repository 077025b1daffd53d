# SPDX-License-Identifier: Apache-2.0
"""One booted kernel under test, and running commands inside it."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.system.guest.errors import GuestError
from tests.system.guest.kernel import GuestKernel
from tests.system.guest.qmp import QmpClient

from .channel import Channel, Running
from .clock import tsc_khz
from .console import KernelConsole
from .contents import PAGER, initramfs
from .debian import debian_kernel
from .result import Result
from .stopped import stopped_cpu

_BOOT_LIMIT_SECONDS = 120.0
_OFF_LIMIT_SECONDS = 20.0
_CONSOLE_LIMIT_SECONDS = 5.0
_COMMAND_LINE = (
    "console=ttyS0",
    "loglevel=5",  # warnings show, and with them every report of the kernel's about itself
    "panic=-1",  # with -no-reboot a panic ends QEMU
    "mitigations=off",
    "nosoftlockup",  # an emulated CPU on a busy machine may well stand still for a while
    "rcupdate.rcu_cpu_stall_suppress=1",
    "no_timer_check",
    "maxcpus=1",  # init starts the others, when it has done what must be done on one
    "tsc=reliable",
    "random.trust_cpu=on",
)
ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin:/tests",
    "HOME": "/root",
    "LC_ALL": "C.UTF-8",
    "FROSTLINE_PAGER": PAGER,
    "FL_TEST_SLOW": "1",  # an emulated CPU: no test shall measure time or do its full number of rounds
}


@dataclass(frozen=True)
class KernelConfig:
    """What to boot. ``added``: path in the guest -> file here; ``texts``: path -> content, a script where it begins so.
    ``images``: ext4 images, see images.py. ``environment``: of every command, beside what all have.
    ``nodes``: NUMA nodes; memory and CPUs are divided among them.
    """

    memory_mib: int = 1024
    vcpus: int = 2
    nodes: int = 1
    added: Mapping[str, Path] = field(default_factory=dict)
    texts: Mapping[str, str] = field(default_factory=dict)
    images: tuple[Path, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    command_line: tuple[str, ...] = ()


class Kernel:
    """A context manager that boots a kernel and ends it. Enter it from the main thread; limits are seconds.

    Failures are GuestError, with the console's end. After one that the kernel itself is to blame for (it hangs, it
    panicked, it warned) ``broken()`` says so, and only another boot helps.
    """

    def __init__(self, config: KernelConfig, folder: Path, kernel: GuestKernel | None = None) -> None:
        """``folder`` gets console.log, qemu.log and the initramfs. ``kernel``: the newest Debian one by default."""
        self.config = config
        self.folder = folder
        self.kernel = kernel or debian_kernel()
        self.boot_seconds = 0.0
        self._broken: str | None = None

    def __enter__(self) -> Self:
        start = time.monotonic()
        self._start()
        try:
            if not self._channel.wait(lambda: self._channel.ready_text is not None, _BOOT_LIMIT_SECONDS):
                raise GuestError(f"{self.kernel.package} does not boot within {_BOOT_LIMIT_SECONDS:g} s{self._tail()}")
            self._complain_about_the_kernel()
        except BaseException:
            self._end()
            raise
        self.boot_seconds = time.monotonic() - start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.broken() is None:
            self._channel.power_off()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_OFF_LIMIT_SECONDS)
        self._end()

    def _nodes(self) -> list[str]:
        nodes, vcpus = self.config.nodes, self.config.vcpus
        if nodes == 1:
            return []
        if self.config.memory_mib % nodes or vcpus % nodes:
            raise GuestError(f"{self.config.memory_mib} MiB and {vcpus} CPUs cannot be divided among {nodes} nodes")
        each, cpus = self.config.memory_mib // nodes, vcpus // nodes
        arguments = []
        for node in range(nodes):
            arguments += ["-object", f"memory-backend-ram,id=node{node},size={each}M"]
            arguments += ["-numa", f"node,memdev=node{node},cpus={node * cpus}-{(node + 1) * cpus - 1}"]
        return arguments

    def _arguments(self, image: Path, port: int, console: int, monitor: int) -> list[str]:
        command = ["qemu-system-x86_64", "-machine", "pc", "-no-user-config", "-nodefaults", "-display", "none"]
        command += ["-name", "kernel,debug-threads=on"]
        # TCG's "max" has AMD's SVM with nested paging, whatever the machine: KVM works inside.
        command += ["-accel", "tcg,thread=multi,tb-size=256", "-cpu", "max"]
        command += ["-smp", f"{self.config.vcpus},sockets={self.config.nodes}"]
        command += ["-m", f"{self.config.memory_mib}M", "-no-reboot", *self._nodes()]
        command += ["-chardev", f"socket,id=console,fd={console}", "-serial", "chardev:console"]
        command += ["-chardev", f"socket,id=port,fd={port}", "-device", "virtio-serial-pci"]
        command += ["-device", "virtserialport,chardev=port,name=frostline,nr=1"]
        command += ["-chardev", f"socket,id=monitor,fd={monitor}", "-mon", "chardev=monitor,mode=control"]
        for number, disk in enumerate(self.config.images):
            command += ["-drive", f"if=none,id=disk{number},file={disk},format=raw,readonly=on"]
            command += ["-device", f"virtio-blk-pci,drive=disk{number}"]
        line = [
            *_COMMAND_LINE,
            f"tsc_early_khz={tsc_khz()}",
            f"fl.disks={len(self.config.images)}",
            *self.config.command_line,
        ]
        command += ["-kernel", str(self.kernel.image), "-initrd", str(image), "-append", " ".join(line)]
        return command

    def _start(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise GuestError("boot from the main thread: QEMU is told to end with the thread that started it")
        self.folder.mkdir(parents=True, exist_ok=True)
        image = self.folder / "initramfs.cpio"
        image.write_bytes(initramfs(self.kernel, self.config.added, self.config.texts))
        (our_port, port), (our_console, console), (our_monitor, monitor) = (socket.socketpair() for _ in range(3))
        theirs = [port.fileno(), console.fileno(), monitor.fileno()]
        try:
            with (self.folder / "qemu.log").open("ab") as log:
                self._process = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "--", *self._arguments(image, *theirs)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=theirs,
                    start_new_session=True,  # a ^C at the terminal is for us to act on, in our order
                )
        except OSError as error:
            our_port.close()
            our_console.close()
            our_monitor.close()
            raise GuestError(f"cannot start setpriv: {error}; install util-linux") from error
        finally:
            port.close()
            console.close()
            monitor.close()
        self._monitor = QmpClient(our_monitor)
        self._console = KernelConsole(our_console, self.folder / "console.log")
        self._channel = Channel(our_port)

    def _end(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(_OFF_LIMIT_SECONDS)
        self._channel.close()
        self._console.close()
        self._monitor.close()
        with contextlib.suppress(OSError):
            os.unlink(self.folder / "initramfs.cpio")

    def _tail(self) -> str:
        said = (self.folder / "qemu.log").read_bytes()[-2000:].decode(errors="replace").strip()
        return f"\nQEMU: {said or 'says nothing'}\nconsole:\n{self._console.tail()}"

    def _complain_about_the_kernel(self) -> None:
        trouble = self._console.trouble()
        if trouble is not None:
            self._broken = trouble
            raise GuestError(f"the kernel under test is in trouble: {trouble}{self._tail()}")

    def broken(self) -> str | None:
        """Why nothing more should be run here; None: all is well."""
        if self._broken is None and self._process.poll() is not None:
            self._broken = f"QEMU ended with {self._process.returncode}"
        return self._broken or self._console.trouble()

    @property
    def monitor(self) -> QmpClient:
        """QEMU's."""
        return self._monitor

    def stopped(self) -> str | None:
        """Proof that the emulator is to blame for what hangs, not what runs inside; nothing more is to be run then."""
        if self._process.poll() is not None:
            return None
        with contextlib.suppress(GuestError):  # no answer is no proof
            why = stopped_cpu(self._monitor, self.config.vcpus)
            self._broken = self._broken or why
            return why
        return None

    @property
    def ready_text(self) -> str:
        """The kernel's release, then a line for each thing that its init could not do."""
        return self._channel.ready_text or ""

    def start(
        self,
        command: Sequence[str],
        timeout: float = 60,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        keep_children: bool = False,
    ) -> Running:
        """Start a command and go on. When its time is up it is killed with all that it has started, and says where
        it hung; so is what it leaves behind at its end, unless ``keep_children``.
        """
        together = {**ENVIRONMENT, **self.config.environment, **(environment or {})}
        return self._channel.start(command, timeout, together, stdin, keep_children)

    def finish(self, running: Running) -> Result:
        """Wait for the end of a command. GuestError if the kernel itself hangs or complains."""
        try:
            result = running.wait()
        except GuestError as error:
            self._broken = str(error).splitlines()[0]
            if self._channel.closed:  # read by another thread than the console, which says why
                self._console.wait_for_end(_CONSOLE_LIMIT_SECONDS)
            raise GuestError(f"{error}{self._tail()}") from error
        try:
            self._complain_about_the_kernel()
        except GuestError as error:
            raise GuestError(f"{result.describe()}\n{error}") from error
        return result

    def run(
        self,
        command: Sequence[str],
        timeout: float = 60,
        environment: Mapping[str, str] | None = None,
        stdin: bytes = b"",
    ) -> Result:
        """Run a command to its end."""
        return self.finish(self.start(command, timeout, environment, stdin))

    def shell(self, script: str, timeout: float = 60) -> str:
        """Run a busybox shell script that must succeed; returns what it wrote."""
        return self.run(["/bin/sh", "-euc", script], timeout).check().stdout

    def read(self, path: str) -> bytes:
        """A file's content out of the guest."""
        return self.run(["cat", path]).check().stdout_bytes

    def write(self, path: str, content: bytes) -> None:
        """A file into the guest."""
        self.run(["/bin/sh", "-c", 'cat > "$0"', path], stdin=content).check()
