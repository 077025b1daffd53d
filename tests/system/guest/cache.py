# SPDX-License-Identifier: Apache-2.0
"""Where kernels and images for test guests are kept, and the lock that keeps two makers apart."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_REPOSITORY = Path(__file__).resolve().parents[3]


def cache_folder(kind: str = "guest") -> Path:
    """A kind's folder: ``$FROSTLINE_CACHE/KIND``, else ``.cache/KIND`` of the checkout; made if absent."""
    root = os.environ.get("FROSTLINE_CACHE")
    folder = (Path(root) if root else _REPOSITORY / ".cache") / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def cache_lock(kind: str = "guest") -> Iterator[Path]:
    """Hold the cache for oneself; yields its folder. Bounded by what the holder does, which is bounded itself."""
    folder = cache_folder(kind)
    with (folder / "lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield folder


def write_atomically(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Write a file so that nobody ever sees half of it. Call with the cache lock held."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    partial.chmod(mode)
    partial.replace(path)


def forget_old(cache: Path, pattern: str, kept: int = 4) -> None:
    """Keep the newest few that match: some may be in use by somebody who has just looked them up. Lock held."""
    by_age = sorted(cache.glob(pattern), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in by_age[kept:]:
        path.unlink()
