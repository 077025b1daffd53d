# SPDX-License-Identifier: Apache-2.0
"""Kernel modules from an unpacked package: what has to be loaded, in which order."""

import gzip
import lzma
import re
from collections.abc import Sequence
from pathlib import Path


def _plain_module(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix == ".xz":
        return lzma.decompress(content)
    return gzip.decompress(content) if path.suffix == ".gz" else content


def modules_in_loading_order(tree: Path, names: Sequence[str]) -> dict[str, bytes]:
    """The modules of those names and what they depend on, decompressed. What is built in is simply not there."""
    # depmod's list is made when a package is installed; a module names what it needs in its .modinfo section.
    files = {path.name.partition(".ko")[0].replace("-", "_"): path for path in sorted(tree.rglob("*.ko*"))}
    loaded: dict[str, bytes] = {}

    def load(name: str) -> None:
        if name in loaded or name not in files:
            return
        content = _plain_module(files[name])
        needed = re.search(rb"\0depends=([^\0]*)\0", content)
        for other in filter(None, needed.group(1).decode().split(",") if needed else []):
            load(other.replace("-", "_"))
        loaded[name] = content

    for name in names:
        load(name.replace("-", "_"))
    return loaded
