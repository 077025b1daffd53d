# SPDX-License-Identifier: Apache-2.0
"""Guest RAM seen from the host: the memfds of a QEMU process, how much they hold, and where a page lies in them."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

# QEMU's own name for the memfds of -object memory-backend-memfd; no other memfd in the process is guest RAM.
_RAM_LINK = "/memfd:memory-backend-memfd (deleted)"
_PAGE_BYTES = 4096
_CHUNK_BYTES = 1 << 20


def ram_memfds(pid: int) -> list[Path]:
    """``/proc/PID/fd/N`` of every guest RAM memfd, one a memfd, by descriptor. Empty if the process is gone."""
    found: dict[int, Path] = {}
    try:
        descriptors = sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda path: int(path.name))
    except (FileNotFoundError, ProcessLookupError):
        return []
    for path in descriptors:
        try:
            if os.readlink(path) == _RAM_LINK:
                found.setdefault(path.stat().st_ino, path)
        except (FileNotFoundError, ProcessLookupError):
            continue  # closed since the folder was read
    return list(found.values())


def resident_bytes(paths: list[Path]) -> int:
    """Bytes of host memory (or swap) that these files hold, by their block counts."""
    return sum(path.stat().st_blocks * 512 for path in paths)


def _data_extents(descriptor: int) -> Iterator[tuple[int, int]]:
    end = 0
    while True:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but hole is left
                return
            raise
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def find_page(path: Path, content: bytes) -> int | None:
    """The offset of the first page with this content in a memfd. Reads no hole, so it fills none."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for start, end in _data_extents(descriptor):
            for offset in range(start, end, _CHUNK_BYTES):
                chunk = os.pread(descriptor, min(_CHUNK_BYTES, end - offset), offset)
                at = chunk.find(content)
                while at > 0 and at % _PAGE_BYTES:
                    at = chunk.find(content, at + 1)
                if at >= 0:
                    return offset + at
    finally:
        os.close(descriptor)
    return None


def overwrite(path: Path, offset: int, content: bytes) -> None:
    """Write into guest RAM behind the guest's back: what no correct tiering may ever look like."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        written = os.pwrite(descriptor, content, offset)
    finally:
        os.close(descriptor)
    if written != len(content):
        raise OSError(errno.EIO, f"only {written} of {len(content)} bytes written", str(path))
