# SPDX-License-Identifier: Apache-2.0
"""Where kernels and images for test guests are kept, and the lock that keeps two makers apart."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[3]


def cache_folder() -> Path:
    """The folder for guests: ``$FROSTLINE_CACHE/guest``, else ``.cache/guest`` of the checkout; made if absent."""
    root = os.environ.get("FROSTLINE_CACHE")
    folder = (Path(root) if root else _REPOSITORY / ".cache") / "guest"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def cache_lock() -> Iterator[Path]:
    """Hold the cache for oneself; yields its folder. Bounded by what the holder does, which is bounded itself."""
    folder = cache_folder()
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that nobody ever sees half of it. Call with the cache lock held."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.chmod(0o644)
    partial.replace(path)
