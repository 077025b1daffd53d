# SPDX-License-Identifier: Apache-2.0
"""The guest's file system: one static program as init, and a few kernel modules, in a gzipped newc archive."""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .build import digest_of, static_program
from .cache import cache_folder, cache_lock, forget_old, write_atomically
from .kernel import GuestKernel

_SOURCES = Path(__file__).resolve().parent / "workload"


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


def workload_program() -> Path:
    """The static ``guest-workload``; it also runs on the host (``--dump``, ``--process``). Built if sources changed."""
    return static_program("guest-workload", _SOURCES)


def guest_initramfs(kernel: GuestKernel) -> Path:
    """The initramfs for a kernel; rebuilt when the workload's sources or the modules have changed."""
    program = workload_program()
    image = cache_folder() / f"initramfs-{digest_of([program, *kernel.modules])}.gz"
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
        forget_old(cache, "initramfs-*.gz")
    return image
