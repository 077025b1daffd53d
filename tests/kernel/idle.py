# SPDX-License-Identifier: Apache-2.0
"""A kernel with page_idle, which Debian's have not: built from Debian's newest source, kept by its config's hash."""

import hashlib
import os
import re
import shutil
import tempfile
from pathlib import Path

from tests.system.guest.cache import cache_folder, cache_lock, write_atomically
from tests.system.guest.errors import GuestError
from tests.system.guest.kernel import GuestKernel, keep_kernel, kept_kernel
from tests.system.guest.tools import run_tool

from .debian import CACHE, OLDEST, SUITES, version_key
from .isolated_apt import IsolatedApt

CONFIG = Path(__file__).resolve().parent / "idle.config"
_UNPACK_LIMIT_SECONDS = 600
_CONFIGURE_LIMIT_SECONDS = 600
_BUILD_LIMIT_SECONDS = 5400
_NEEDED = ("flex", "bison", "bc", "libelf-dev", "libssl-dev", "xz-utils", "kmod", "lz4", "make", "gcc")


def _stamp() -> Path:
    """The record of the kernel that this config makes."""
    return cache_folder(CACHE) / f"idle-{hashlib.sha256(CONFIG.read_bytes()).hexdigest()[:16]}.json"


def kept_idle_kernel() -> GuestKernel | None:
    """The kernel of today's config, if it has been built."""
    return kept_kernel(_stamp())


def _fetch_source(work: Path) -> tuple[str, Path]:
    """The newest source that is new enough: the package's version, and its tarball."""
    said: list[str] = []
    for suite in SUITES:
        folder = work / suite
        try:
            apt = IsolatedApt(folder, suite)
            names = [
                name
                for name in apt.names(r"linux-source-[0-9]+\.[0-9]+")
                if version_key(name.removeprefix("linux-source-")) >= OLDEST
            ]
            if not names:
                said.append(f"{suite}: no linux-source >= {'.'.join(map(str, OLDEST))}")
                continue
            name = max(names, key=lambda each: version_key(each.removeprefix("linux-source-")))
            version = apt.version(name)
            apt.unpack([name], folder / "tree")
        except GuestError as error:
            said.append(f"{suite}: {error}")
            continue
        tarballs = sorted((folder / "tree").rglob("linux-source-*.tar.*"))
        if tarballs:
            return f"{name} {version}", tarballs[0]
        said.append(f"{suite}: {name} holds no tarball")
    raise GuestError("no kernel source can be fetched; tried " + "; ".join(said))


def _need_tools() -> None:
    listed = run_tool(["dpkg-query", "--show", "--showformat=${Package} ${db:Status-Status}\n"], 60)
    there = {line.split()[0] for line in listed.splitlines() if line.endswith(" installed")}
    missing = [name for name in _NEEDED if name not in there]
    if not missing:
        return
    if os.geteuid() != 0:
        raise GuestError(f"building a kernel needs {', '.join(missing)}: install them, or run this as root")
    print(f"frostline: installing {', '.join(missing)} (to build a kernel)", flush=True)
    run_tool(["apt-get", "update", "-q"], 600)
    run_tool(["apt-get", "install", "-y", "-q", "--no-install-recommends", *missing], 900)


def unmet(wanted: str, config: str) -> list[str]:
    """Lines of a fragment that a finished config does not have."""
    lines = set(config.splitlines())
    missing = []
    for line in wanted.splitlines():
        off = re.fullmatch(r"# (CONFIG_\w+) is not set", line)
        if off is not None:
            if any(each.startswith(f"{off.group(1)}=") for each in lines):
                missing.append(line)
        elif line.startswith("CONFIG_") and line not in lines:
            missing.append(line)
    return missing


def _build(tarball: Path, work: Path) -> Path:
    """Returns the bzImage."""
    run_tool(["tar", "xf", str(tarball), "-C", str(work)], _UNPACK_LIMIT_SECONDS)
    source = next(path for path in sorted(work.glob("linux-source-*")) if path.is_dir())
    run_tool(["make", "-s", "tinyconfig"], _CONFIGURE_LIMIT_SECONDS, source)
    merge = ["scripts/kconfig/merge_config.sh", "-m", ".config", str(CONFIG)]
    run_tool(merge, _CONFIGURE_LIMIT_SECONDS, source)
    run_tool(["make", "-s", "olddefconfig"], _CONFIGURE_LIMIT_SECONDS, source)
    missing = unmet(CONFIG.read_text(), (source / ".config").read_text())
    if missing:
        raise GuestError(f"this source does not take all of {CONFIG.name}: {', '.join(missing)}")
    jobs = len(os.sched_getaffinity(0))
    run_tool(["nice", "-n", "10", "make", "-s", f"-j{jobs}", "bzImage"], _BUILD_LIMIT_SECONDS, source)
    return source / "arch" / "x86" / "boot" / "bzImage"


def idle_kernel() -> GuestKernel:
    """The kernel of today's config; built if it is not in the cache, which takes some ten minutes of two cores."""
    kernel = kept_idle_kernel()
    if kernel is not None:
        return kernel
    with cache_lock(CACHE) as cache:
        kernel = kept_idle_kernel()  # somebody else may have built it meanwhile
        if kernel is not None:
            return kernel
        _need_tools()
        work = Path(tempfile.mkdtemp(prefix="build-", dir=cache))
        try:
            package, tarball = _fetch_source(work)
            print(f"frostline: building {package} with {CONFIG.name}; some ten minutes, once", flush=True)
            image = _build(tarball, work).read_bytes()
        finally:
            shutil.rmtree(work, ignore_errors=True)
        target = cache / _stamp().stem
        target.mkdir(exist_ok=True)
        write_atomically(target / "vmlinuz", image)
        kernel = GuestKernel(f"{package}, {CONFIG.name}", target / "vmlinuz", ())
        keep_kernel(_stamp(), kernel)
        return kernel
