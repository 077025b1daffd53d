# SPDX-License-Identifier: Apache-2.0
"""A real Linux guest in an unmodified QEMU, steered and watched from a test."""

import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import memfd
from .accelerator import choose_accelerator
from .config import GuestConfig
from .console import Status
from .errors import GuestError
from .initramfs import workload_program
from .process import QemuProcess

_POLL_SECONDS = 0.1
_PAGES_PER_MIB = 256


@dataclass(frozen=True)
class PagePlace:
    """Where a page of the workload lies in the guest's physical memory, and in which generation it is."""

    gpa: int
    generation: int


class Guest:
    """One guest; a context manager that starts it and ends it. Limits are seconds; failures are GuestError
    with the console's last lines. All methods but start() may be called from any thread, one at a time.
    """

    def __init__(self, config: GuestConfig, folder: Path) -> None:
        """``folder`` gets console.log and qemu.log; it is made if absent."""
        self.config = config
        self.folder = folder
        self.accelerator = ""
        self._qemu: QemuProcess | None = None
        self._jobs_asked = 0
        self._memory_mib = config.memory_mib
        self._plugged = 0

    # --- life ---

    def start(self) -> None:
        """Start QEMU, from the main thread; the guest then boots and fills by itself."""
        if self._qemu is not None:
            raise GuestError(f"guest {self.config.name} was started before")
        self.accelerator = choose_accelerator(self.config)
        self._qemu = QemuProcess(self.config, self.accelerator, self.folder)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown(graceful=False)

    def shutdown(self, graceful: bool = True, timeout: float = 30) -> None:
        """End the guest: powered off by its own kernel, or (not graceful, or too slow) by ending QEMU."""
        if self._qemu is None:
            return
        if graceful and self.alive():
            try:
                self.command("poweroff")
                self._qemu.process.wait(timeout)
            except (GuestError, subprocess.TimeoutExpired):
                pass  # then the hard way
        self._qemu.end()

    def kill(self) -> None:
        """SIGKILL to QEMU: a VMM that is suddenly gone."""
        self._started().process.kill()
        self._started().process.wait(20)

    def alive(self) -> bool:
        return self._qemu is not None and self._qemu.alive()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._started().process.pid

    def _started(self) -> QemuProcess:
        if self._qemu is None:
            raise GuestError(f"guest {self.config.name} is not started")
        return self._qemu

    def describe(self) -> str:
        """State, QEMU's words and the console's last lines."""
        return f"guest {self.config.name}: {self._started().describe()}"

    # --- what the workload says ---

    def status(self) -> Status:
        """The latest status. GuestError before the first one."""
        status = self._started().console.status()
        if status is None:
            raise GuestError(f"no status yet from {self.describe()}")
        return status

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """What the workload said beside its status; kind "error": one entry a wrong page, as far as described."""
        return self._started().console.events(kind)

    def wait_status(self, wanted: Callable[[Status], bool], timeout: float, what: str = "") -> Status:
        """Wait for a status for which ``wanted`` is true."""
        console = self._started().console

        def ready() -> bool:
            status = console.status()
            return status is not None and wanted(status)

        if not console.wait(ready, timeout):
            raise GuestError(f"waited (at most {timeout:g} s) for {what or 'a status'} in vain; {self.describe()}")
        return self.status()

    def wait_booted(self, timeout: float = 60) -> None:
        """Wait until the workload runs as the guest's init."""
        console = self._started().console
        if not console.wait(lambda: bool(console.events("booted")), timeout):
            raise GuestError(f"did not boot in {timeout:g} s under {self.accelerator}: {self.describe()}")

    def wait_filled(self, timeout: float = 180) -> Status:
        """Wait until the memory is filled and the run has begun."""
        pages = self.config.fill_mib * _PAGES_PER_MIB
        return self.wait_status(
            lambda status: status.phase != "fill" and status.filled_pages >= pages, timeout, "the memory to be filled"
        )

    def wait_rounds(self, rounds: int, timeout: float) -> Status:
        """Wait for so many more sweeps over the hot set (one a second, unless pages are slow to come)."""
        target = self.status().round + rounds
        return self.wait_status(lambda status: status.round >= target, timeout, f"round {target}")

    # --- steering it ---

    def command(self, line: str) -> None:
        """Send a command line: "run", "stop", "rate 200", "writers 2", ... (workload/main.c). Not waited for."""
        self._started().console.send(line)

    def _job(self, verb: str, argument: str, timeout: float) -> Status:
        self._jobs_asked += 1
        number = self._jobs_asked
        self.command(f"{verb} {number} {argument}".rstrip())
        return self.wait_status(lambda status: status.jobs_done >= number, timeout, f"{verb} to be done")

    def verify(self, timeout: float = 120) -> int:
        """Compare every byte of every filled page now. Returns all errors since boot (0: nothing was ever wrong)."""
        return self._job("verify", "", timeout).errors

    def grow(self, to_mib: int, timeout: float = 120) -> Status:
        """Fill more memory, up to ``to_mib`` in all."""
        return self._job("grow", str(to_mib), timeout)

    def shrink(self, to_mib: int, timeout: float = 60) -> Status:
        """Free the filled memory beyond ``to_mib`` to the guest's kernel (never the hot set)."""
        return self._job("shrink", str(to_mib), timeout)

    def where(self, page: int, timeout: float = 10) -> PagePlace:
        """Where a filled page lies. GuestError if it is not filled."""
        console = self._started().console
        before = len(console.events("refused"))

        def answers() -> list[dict[str, Any]]:
            return [event for event in console.events("where") if event["page"] == page]

        seen = len(answers())
        self.command(f"where {page}")
        console.wait(lambda: len(answers()) > seen or len(console.events("refused")) > before, timeout)
        if len(answers()) <= seen:
            raise GuestError(f"no answer where page {page} is; {self.describe()}")
        return PagePlace(answers()[-1]["gpa"], answers()[-1]["generation"])

    # --- its memory, from the host ---

    def qmp(self, command: str, timeout: float = 10, **arguments: Any) -> Any:
        """Run a QMP command; underscores in argument names become dashes."""
        return self._started().qmp.execute(command, timeout_seconds=timeout, **arguments)

    @property
    def memfd_paths(self) -> list[Path]:
        """``/proc/PID/fd/N`` of the memfds that are guest RAM; empty for other backends and after the end."""
        return memfd.ram_memfds(self.pid)

    def memfd_resident_bytes(self) -> int:
        """Host memory that guest RAM holds now: the blocks of its memfds."""
        return memfd.resident_bytes(self.memfd_paths)

    def page_content(self, page: int, generation: int = 1) -> bytes:
        """The 4096 bytes that a page must hold in a generation (1: as filled)."""
        settings = self.config.workload.content_settings()
        command = [str(workload_program()), "--dump", str(page), "1", str(generation), *settings]
        return subprocess.run(command, stdout=subprocess.PIPE, timeout=10, check=True).stdout

    def find_page(self, content: bytes) -> tuple[Path, int]:
        """The memfd and the offset where this content lies; GuestError if it is in none."""
        for path in self.memfd_paths:
            offset = memfd.find_page(path, content)
            if offset is not None:
                return path, offset
        raise GuestError(f"that page is in none of {self.memfd_paths} of guest {self.config.name}")

    def hotplug(self, mib: int, timeout: float = 30) -> Status:
        """Plug in a DIMM (a multiple of 128 MiB) and wait until the guest counts it. Needs hotplug_slots."""
        before_kib = self.status().mem_total_kib
        identity = f"plugged{self._plugged}"
        self._plugged += 1
        described = self.config.memory_object(identity, mib)
        self.qmp("object-add", **described)
        self.qmp("device_add", driver="pc-dimm", id=f"dimm-{identity}", memdev=identity)
        self._memory_mib += mib
        wanted_kib = before_kib + mib * 1024 * 9 // 10  # a little goes into the guest's own page descriptors
        return self.wait_status(lambda status: status.mem_total_kib >= wanted_kib, timeout, f"{mib} MiB more memory")

    def balloon(self, to_mib: int, timeout: float = 60) -> None:
        """Have the balloon take memory until the guest has ``to_mib``, or give it back. Needs balloon=True."""
        self.qmp("balloon", value=to_mib << 20)
        deadline = time.monotonic() + timeout
        while (actual := int(self.qmp("query-balloon")["actual"])) != to_mib << 20:
            if time.monotonic() > deadline:
                raise GuestError(
                    f"the balloon reached {actual >> 20} MiB, not {to_mib}, in {timeout:g} s; {self.describe()}"
                )
            time.sleep(_POLL_SECONDS)
