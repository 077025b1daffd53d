# SPDX-License-Identifier: Apache-2.0
"""A guest kernel: this machine's own Debian release's cloud kernel, taken through its apt and never installed."""

import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .cache import cache_folder, cache_lock, write_atomically
from .errors import GuestError
from .modules import modules_in_loading_order
from .tools import run_tool

_META_PACKAGE = "linux-image-cloud-amd64"
_QUERY_LIMIT_SECONDS = 60
_DOWNLOAD_LIMIT_SECONDS = 300
# With what they depend on; those a kernel has built in are simply not there.
_MODULES = ("virtio_pci", "virtio_balloon")


@dataclass(frozen=True)
class GuestKernel:
    """A kernel in the cache: its image and the modules (in loading order) for the initramfs."""

    package: str
    image: Path
    modules: tuple[Path, ...]


def _dependencies(package: str) -> list[str]:
    shown = run_tool(["apt-cache", "--no-all-versions", "show", package], _QUERY_LIMIT_SECONDS)
    listed = re.search(r"^Depends: (.*)$", shown, re.MULTILINE)
    return re.findall(r"(?:^|, )([a-z0-9.+-]+)", listed.group(1)) if listed else []


def _resolve() -> list[str]:
    """The newest cloud kernel's packages: its image, and what a split packaging keeps beside it."""
    images = [name for name in _dependencies(_META_PACKAGE) if name.startswith("linux-image-")]
    if not images:
        raise GuestError(f"apt knows no image for {_META_PACKAGE}; run apt-get update; this needs Debian on amd64")
    beside = [name for name in _dependencies(images[0]) if re.match(r"linux-(binary|modules)-.*cloud-amd64", name)]
    return [images[0], *beside]


def _download(packages: list[str], folder: Path) -> None:
    # As root apt would fetch as user _apt, who cannot write here, and warns about it.
    options = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    run_tool(["apt-get", *options, "download", *packages], _DOWNLOAD_LIMIT_SECONDS, folder)


def _resolve_and_download(folder: Path) -> str:
    """Returns the image package's name. An index older than the mirror is brought up to date once."""
    try:
        packages = _resolve()
        _download(packages, folder)
    except GuestError:
        if os.geteuid() != 0:
            raise
        run_tool(["apt-get", "update"], _DOWNLOAD_LIMIT_SECONDS)
        packages = _resolve()
        _download(packages, folder)
    return packages[0]


def _collect(tree: Path, package: str, cache: Path) -> GuestKernel:
    images = sorted(tree.rglob("vmlinuz-*"))
    if not images:
        raise GuestError(f"package {package} holds no vmlinuz but {sorted(path.name for path in tree.iterdir())}")
    version = images[0].name.removeprefix("vmlinuz-")
    target = cache / f"kernel-{version}"
    target.mkdir(exist_ok=True)
    write_atomically(target / "vmlinuz", images[0].read_bytes())
    modules = modules_in_loading_order(tree, _MODULES)
    for name, content in modules.items():
        write_atomically(target / f"{name}.ko", content)
    return GuestKernel(package, target / "vmlinuz", tuple(target / f"{name}.ko" for name in modules))


def kept_kernel(stamp: Path) -> GuestKernel | None:
    """The kernel that a record in its cache folder names; None when there is none, or not all of it is there."""
    try:
        kept = json.loads(stamp.read_text())
        kernel = GuestKernel(
            kept["package"],
            stamp.parent / kept["image"],
            tuple(stamp.parent / name for name in kept["modules"]),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return kernel if all(path.is_file() for path in (kernel.image, *kernel.modules)) else None


def keep_kernel(stamp: Path, kernel: GuestKernel) -> None:
    """Write that record, as the last step of getting a kernel. Call with the cache lock held."""
    record = {
        "package": kernel.package,
        "image": str(kernel.image.relative_to(stamp.parent)),
        "modules": [str(path.relative_to(stamp.parent)) for path in kernel.modules],
    }
    write_atomically(stamp, json.dumps(record, indent=1).encode() + b"\n")


def guest_kernel(refresh: bool = False) -> GuestKernel:
    """The cached guest kernel; fetched if there is none, or anew with ``refresh``. Raises GuestError."""
    stamp = cache_folder() / "kernel.json"
    kernel = None if refresh else kept_kernel(stamp)
    if kernel is not None:
        return kernel
    with cache_lock() as cache:
        kernel = None if refresh else kept_kernel(stamp)  # somebody else may have made it meanwhile
        if kernel is not None:
            return kernel
        work = Path(tempfile.mkdtemp(prefix="fetch-", dir=cache))
        try:
            package = _resolve_and_download(work)
            tree = work / "tree"
            for archive in sorted(work.glob("*.deb")):
                run_tool(["dpkg", "-x", str(archive), str(tree)], _QUERY_LIMIT_SECONDS)
            kernel = _collect(tree, package, cache)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        keep_kernel(stamp, kernel)
        return kernel
