# SPDX-License-Identifier: Apache-2.0
"""File system images of programs of this machine, for the guest: each file at the path that it has here.

An image is a read-only ext4 file system, made without mounting and kept in the cache by what is in it. Beside the files
it holds `links`, the paths that the guest's init makes point into it.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.system.guest.cache import cache_folder, cache_lock, forget_old
from tests.system.guest.errors import GuestError
from tests.system.guest.tools import run_tool

from .contents import shared_libraries
from .debian import CACHE

_MAKE_LIMIT_SECONDS = 120
_SPARE_SHARE = 4  # the file system's own needs: a quarter, and some for the journal-less rest
_SPARE_BYTES = 8 << 20
_BLOCK_BYTES = 4096
_FORM = b"2"  # another one when the same files make another image: 2 keeps their times


def _digest(files: Mapping[str, Path], links: Iterable[str]) -> str:
    digest = hashlib.sha256(_FORM)
    for place, source in sorted(files.items()):
        digest.update(f"{place}\0{source.stat().st_mode}\0".encode())
        digest.update(hashlib.sha256(source.read_bytes()).digest())
    digest.update("\n".join(sorted(links)).encode())
    return digest.hexdigest()[:16]


def _make(files: Mapping[str, Path], links: Iterable[str], target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="image-", dir=target.parent) as folder:
        tree, used = Path(folder) / "tree", 0
        for place, source in files.items():
            copy = tree / place.lstrip("/")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copy)  # with its time, or Python would compile each module at each start
            used += -(-source.stat().st_size // _BLOCK_BYTES) * _BLOCK_BYTES + _BLOCK_BYTES
        (tree / "links").write_text("".join(f"{link}\n" for link in sorted(links)))
        kibibytes = (used + used // _SPARE_SHARE + _SPARE_BYTES) >> 10
        options = ["-q", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-N", str(len(files) * 2 + 1000)]
        partial = Path(folder) / "image"
        command = ["mke2fs", *options, "-b", str(_BLOCK_BYTES), "-d", str(tree), str(partial), f"{kibibytes}k"]
        run_tool(command, _MAKE_LIMIT_SECONDS)
        partial.replace(target)


def image_of(name: str, files: Mapping[str, Path], links: Iterable[str]) -> Path:
    """The image of these files (path in the guest -> file here) and of the libraries that they need.

    ``links``: paths, of files or of folders, that are to be there in the guest's root; libraries are by themselves.
    """
    libraries = shared_libraries(files.values())
    # Two paths to one folder (/lib and /usr/lib) name one library twice; the guest has both names.
    together = {**libraries, **files}
    wanted = {*links, *libraries}
    image = cache_folder(CACHE) / f"{name}-{_digest(together, wanted)}.ext4"
    if not image.exists():
        if shutil.which("mke2fs") is None and not os.access("/sbin/mke2fs", os.X_OK):
            raise GuestError("mke2fs is not there: install e2fsprogs")
        with cache_lock(CACHE) as cache:
            _make(together, wanted, image)
            forget_old(cache, f"{name}-*.ext4", kept=2)
    return image


def package_files(package: str) -> list[Path]:
    """The files of an installed Debian package; none where there is no such package or no dpkg."""
    try:
        listed = subprocess.run(["dpkg", "-L", package], capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return []
    return [path for line in listed.stdout.splitlines() if (path := Path(line)).is_file()]
