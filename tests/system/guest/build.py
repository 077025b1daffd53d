# SPDX-License-Identifier: Apache-2.0
"""Static programs for guests, kept in the cache by what they are made of."""

import hashlib
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cache import cache_folder, cache_lock, forget_old, write_atomically
from .tools import run_tool

_COMPILE = ("gcc", "-std=c11", "-D_GNU_SOURCE", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread")
_COMPILE_LIMIT_SECONDS = 120


def digest_of(paths: Sequence[Path]) -> str:
    """What a file made of these files is kept under."""
    digest = hashlib.sha256(" ".join(_COMPILE).encode())
    for path in paths:
        digest.update(f"\n{path.name}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(sources: Sequence[Path]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="frostline-") as folder:
        program = Path(folder) / "program"
        files = [str(path) for path in sources if path.suffix == ".c"]
        run_tool([*_COMPILE, "-o", str(program), *files], _COMPILE_LIMIT_SECONDS)
        return program.read_bytes()


def static_program(name: str, folder: Path, kind: str = "guest") -> Path:
    """The program made of a folder's C files, from the cache if they have not changed since."""
    sources = sorted(folder.glob("*.[ch]"))
    program = cache_folder(kind) / f"{name}-{digest_of(sources)}"
    if not program.exists():
        with cache_lock(kind) as cache:
            write_atomically(program, _compile(sources), mode=0o755)
            forget_old(cache, f"{name}-*")
    return program
