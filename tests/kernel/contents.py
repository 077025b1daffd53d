# SPDX-License-Identifier: Apache-2.0
"""What is inside the guest: its init, busybox, the pager, the C tests, and the libraries that these need."""

import os
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from tests.system.guest.build import static_program
from tests.system.guest.errors import GuestError
from tests.system.guest.initramfs import Entry, newc_archive
from tests.system.guest.kernel import GuestKernel
from tests.system.guest.tools import run_tool

_REPOSITORY = Path(__file__).resolve().parents[2]
# Another build of the C programs may be tried, e.g. one with sanitizers.
NATIVE_BUILD = Path(os.environ.get("FROSTLINE_NATIVE_BUILD", _REPOSITORY / "build" / "native"))
TESTS_FOLDER = "/tests"
PAGER = "/tests/frostline-pager"
_LDD_LIMIT_SECONDS = 60


def c_tests() -> list[Path]:
    """The C test programs that have been built."""
    return sorted(path for path in (NATIVE_BUILD / "tests").glob("test_*") if path.is_file() and path.suffix == "")


def is_elf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"\x7fELF"


def shared_libraries(programs: Iterable[Path]) -> dict[str, Path]:
    """Where in the guest -> the file here, of all libraries (and the loader) that these programs need."""
    elves = [str(path.resolve()) for path in programs if is_elf(path)]
    if not elves:
        return {}
    # ldd's exit code is 1 when one of them is static, which is fine.
    done = subprocess.run(["ldd", *elves], capture_output=True, text=True, timeout=_LDD_LIMIT_SECONDS, check=False)
    missing = re.findall(r"^\s*(\S+) => not found", done.stdout, re.MULTILINE)
    if missing:
        raise GuestError(
            f"libraries that the programs for the guest need are not here: {', '.join(sorted(set(missing)))}"
        )
    found = re.findall(r"^\s*(?:\S+ => )?(/\S+) \(0x", done.stdout, re.MULTILINE)
    return {path: Path(path) for path in found}


def _busybox() -> tuple[Path, list[str]]:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise GuestError("busybox is not there: install busybox-static")
    return Path(busybox), run_tool([busybox, "--list"], _LDD_LIMIT_SECONDS).split()


class _Tree:
    """Entries of an archive, folders before what is in them and each once."""

    def __init__(self) -> None:
        self.entries: dict[str, Entry] = {}

    def folder(self, path: str) -> None:
        parts = path.strip("/").split("/")
        for count in range(1, len(parts) + 1):
            name = "/".join(parts[:count])
            self.entries.setdefault(name, Entry(name, 0o040755))

    def add(self, path: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        name = path.strip("/")
        if "/" in name:
            self.folder(name.rpartition("/")[0])
        self.entries[name] = Entry(name, mode, content, device)

    def file(self, path: str, source: Path) -> None:
        executable = source.stat().st_mode & stat.S_IXUSR
        self.add(path, 0o100755 if executable else 0o100644, source.read_bytes())


def initramfs(kernel: GuestKernel, added: Mapping[str, Path], texts: Mapping[str, str]) -> bytes:
    """The archive for a kernel. Beside what every guest has, at paths in the guest: ``added``, files from here, and
    ``texts``, executable where they begin as scripts do.
    """
    tree = _Tree()
    for folder in ("dev", "proc", "sys", "tmp", "run", "root", "etc", "var/tmp", "var/lib", "var/log"):
        tree.folder(folder)
    tree.add("dev/console", 0o020600, b"", (5, 1))  # the kernel opens it before init can mount /dev
    tree.file("init", static_program("kernel-init", Path(__file__).resolve().parent / "init", "kernel"))
    tree.add("etc/passwd", 0o100644, b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n")
    tree.add("etc/group", 0o100644, b"root:x:0:\nnogroup:x:65534:\n")
    tree.add("etc/hosts", 0o100644, b"127.0.0.1 localhost kernel\n")
    tree.add("modules/order", 0o100644, "".join(f"{path.name}\n" for path in kernel.modules).encode())
    for path in kernel.modules:
        tree.file(f"modules/{path.name}", path)
    busybox, applets = _busybox()
    tree.file("bin/busybox", busybox)
    for applet in applets:
        if applet != "busybox":
            tree.add(f"bin/{applet}", 0o120777, b"busybox")
    programs: dict[str, Path] = {f"{TESTS_FOLDER}/{path.name}": path for path in c_tests()}
    pager = NATIVE_BUILD / "frostline-pager"
    if pager.exists():
        programs[PAGER] = pager
    programs |= added
    for place, source in (shared_libraries(programs.values()) | programs).items():
        tree.file(place, source)
    for place, text in texts.items():
        tree.add(place, 0o100755 if text.startswith("#!") else 0o100644, text.encode())
    return newc_archive(list(tree.entries.values()))


def parse_added(texts: Sequence[str]) -> dict[str, Path]:
    """``FILE[:PATH]`` of a command line; without a path the file goes to /tests. A folder goes with all in it."""
    added: dict[str, Path] = {}
    for text in texts:
        name, _, place = text.partition(":")
        source = Path(name)
        target = place or f"{TESTS_FOLDER}/{source.name}"
        if source.is_dir():
            inside = (path for path in sorted(source.rglob("*")) if path.is_file())
            added |= {f"{target}/{path.relative_to(source)}": path for path in inside}
        elif source.is_file():
            added[target] = source
        else:
            raise GuestError(f"{name}: no such file to add to the guest")
    return added
