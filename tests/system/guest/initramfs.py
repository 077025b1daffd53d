# SPDX-License-Identifier: Apache-2.0
"""The guest's file system: one static program as init, and a few kernel modules, in a gzipped newc archive."""

import gzip
import hashlib
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_folder, cache_lock, write_atomically
from .errors import GuestError
from .kernel import GuestKernel

_SOURCES = Path(__file__).resolve().parent / "workload"
_COMPILE = ("gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
_COMPILE_LIMIT_SECONDS = 120
_KEPT = 4  # images of earlier sources may be in use by somebody who has just looked them up


@dataclass(frozen=True)
class Entry:
    """One file of an archive. ``mode`` holds type and permissions; ``device`` is (major, minor) of a node."""

    name: str
    mode: int
    content: bytes = b""
    device: tuple[int, int] = (0, 0)


def newc_archive(entries: Sequence[Entry]) -> bytes:
    """An uncompressed cpio archive in the "newc" format (kernel: Documentation/driver-api/early-userspace)."""
    archive = bytearray()
    for number, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        fields = (number, entry.mode, 0, 0, 1, 0, len(entry.content), 0, 0, *entry.device, len(name), 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name
        archive += bytes(-len(archive) % 4)
        archive += entry.content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _digest(paths: Sequence[Path]) -> str:
    digest = hashlib.sha256(" ".join(_COMPILE).encode())
    for path in paths:
        digest.update(f"\n{path.name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _sources() -> list[Path]:
    return sorted(_SOURCES.glob("*.[ch]"))


def _compile() -> bytes:
    with tempfile.TemporaryDirectory(prefix="frostline-") as folder:
        program = Path(folder) / "guest-workload"
        command = [*_COMPILE, "-o", str(program), *(str(path) for path in _sources() if path.suffix == ".c")]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_LIMIT_SECONDS, check=False)
        except FileNotFoundError as error:
            raise GuestError("cannot build guest-workload: gcc is not there; install gcc and libc6-dev") from error
        if done.returncode != 0:
            raise GuestError(f"cannot build guest-workload: gcc: {done.stderr.strip()[-2000:]}")
        return program.read_bytes()


def _forget_old(cache: Path, pattern: str) -> None:
    by_age = sorted(cache.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[_KEPT:]:
        path.unlink()


def workload_program() -> Path:
    """The static ``guest-workload``; it also runs on the host (``--dump``, ``--process``). Built if sources changed."""
    program = cache_folder() / f"guest-workload-{_digest(_sources())}"
    if not program.exists():
        with cache_lock() as cache:
            write_atomically(program, _compile())
            program.chmod(0o755)
            _forget_old(cache, "guest-workload-*")
    return program


def guest_initramfs(kernel: GuestKernel) -> Path:
    """The initramfs for a kernel; rebuilt when the workload's sources or the modules have changed."""
    program = workload_program()
    image = cache_folder() / f"initramfs-{_digest([program, *kernel.modules])}.gz"
    if image.exists():
        return image
    entries = [Entry(folder, 0o040755) for folder in ("dev", "proc", "sys", "modules")]
    entries.append(Entry("dev/console", 0o020600, device=(5, 1)))  # the kernel opens it before init can mount /dev
    entries.append(Entry("init", 0o100755, program.read_bytes()))
    entries += [Entry(f"modules/{path.name}", 0o100644, path.read_bytes()) for path in kernel.modules]
    order = "".join(f"{path.name}\n" for path in kernel.modules)
    entries.append(Entry("modules/order", 0o100644, order.encode()))
    with cache_lock() as cache:
        write_atomically(image, gzip.compress(newc_archive(entries), compresslevel=6, mtime=0))
        _forget_old(cache, "initramfs-*.gz")
    return image
