# SPDX-License-Identifier: Apache-2.0
"""The newest Debian cloud kernel that can have userfaultfd's RWP, fetched once and kept in the cache."""

import re
import shutil
import tempfile
from pathlib import Path

from tests.system.guest.cache import cache_folder, cache_lock, write_atomically
from tests.system.guest.errors import GuestError
from tests.system.guest.kernel import GuestKernel, keep_kernel, kept_kernel
from tests.system.guest.modules import modules_in_loading_order

from .isolated_apt import IsolatedApt

CACHE = "kernel"
# Where to look, the first that has one wins. Which package to take is a matter of versions; what the kernel can do
# is found out by the tests, who probe for it.
SUITES = ("trixie-backports", "forky", "sid")
OLDEST = (7, 3)
# With what they depend on; those a kernel has built in are simply not there.
_MODULES = ("virtio_blk", "kvm-amd", "zram", "overlay", "virtio_balloon", "virtio_net", "tun")


def version_key(text: str) -> tuple[int, ...]:
    """7.3.4+deb13-cloud-amd64 -> (7, 3, 4): what kernels are put in order by."""
    numbers = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(number) for number in numbers.group().split(".")) if numbers else ()


def newest_kernel(names: list[str]) -> tuple[str, list[str]] | None:
    """Of package names, the newest kernel that is new enough: its release and the packages that hold it."""
    releases: dict[str, list[str]] = {}
    for name in names:
        # The image and the modules come in packages of their own; once they were one, linux-image-RELEASE.
        part = re.fullmatch(r"linux-(binary|modules|image)-(\d\S*-cloud-amd64)", name)
        if part is not None:
            releases.setdefault(part.group(2), []).append(part.group(1))
    whole = {
        release: [f"linux-{part}-{release}" for part in (("binary", "modules") if "binary" in parts else ("image",))]
        for release, parts in releases.items()
        if ("binary" in parts and "modules" in parts) or parts == ["image"]
    }
    usable = [release for release in whole if version_key(release) >= OLDEST]
    if not usable:
        return None
    release = max(usable, key=lambda each: (version_key(each), each))
    return release, whole[release]


def _fetch(work: Path) -> tuple[str, Path]:
    """Returns a release and the unpacked packages."""
    said: list[str] = []
    for suite in SUITES:
        folder = work / suite
        try:
            apt = IsolatedApt(folder, suite)
            found = newest_kernel(apt.names(r"linux-(binary|modules|image)-[0-9].*-cloud-amd64"))
            if found is None:
                said.append(f"{suite}: no cloud kernel >= {'.'.join(map(str, OLDEST))}")
                continue
            release, packages = found
            apt.unpack(packages, folder / "tree")
            return release, folder / "tree"
        except GuestError as error:
            said.append(f"{suite}: {error}")
    raise GuestError(
        "no test kernel: none is in the cache "
        f"({cache_folder(CACHE) / 'debian.json'}), and none can be fetched; this needs the Debian mirror of apt's "
        "configuration once. Tried " + "; ".join(said)
    )


def _collect(tree: Path, release: str, cache: Path) -> GuestKernel:
    images = sorted([*tree.rglob("vmlinuz"), *tree.rglob("vmlinuz-*")])
    if not images:
        raise GuestError(f"the packages of {release} hold no vmlinuz")
    target = cache / f"debian-{release}"
    target.mkdir(exist_ok=True)
    write_atomically(target / "vmlinuz", images[0].read_bytes())
    modules = modules_in_loading_order(tree, _MODULES)
    for name, content in modules.items():
        write_atomically(target / f"{name}.ko", content)
    return GuestKernel(release, target / "vmlinuz", tuple(target / f"{name}.ko" for name in modules))


def debian_kernel(refresh: bool = False) -> GuestKernel:
    """The cached kernel; fetched if there is none, or anew with ``refresh``. Raises GuestError."""
    stamp = cache_folder(CACHE) / "debian.json"
    kernel = None if refresh else kept_kernel(stamp)
    if kernel is not None:
        return kernel
    with cache_lock(CACHE) as cache:
        kernel = None if refresh else kept_kernel(stamp)  # somebody else may have made it meanwhile
        if kernel is not None:
            return kernel
        work = Path(tempfile.mkdtemp(prefix="fetch-", dir=cache))
        try:
            release, tree = _fetch(work)
            kernel = _collect(tree, release, cache)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        keep_kernel(stamp, kernel)
        return kernel
