# SPDX-License-Identifier: Apache-2.0
"""This machine's Python, what the frostline package depends on, and the package itself, for the guest."""

import importlib.metadata
import os
import re
import sys
import sysconfig
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tests.system.guest.errors import GuestError

from .boot import KernelConfig
from .contents import NATIVE_BUILD, is_elf
from .images import image_of

_REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE_FOLDER = "/usr/local/lib/frostline-site"
_PACKAGE = f"{PACKAGE_FOLDER}/frostline"
AGENT = "/usr/local/bin/frostline-agent"
# Of the standard library; it is large, and nothing here draws windows or tests Python.
_LEFT_OUT = ("test", "tests", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3", "site-packages")


def python_program() -> Path:
    """The interpreter itself, whatever the environment is called by."""
    return Path(os.path.realpath(sys.executable))


def _below(folder: Path, left_out: Iterable[str] = ()) -> Iterable[Path]:
    skipped = set(left_out)
    for where, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in skipped]
        yield from (path for name in names if (path := Path(where) / name).is_file())


def _depended_on() -> dict[str, importlib.metadata.Distribution]:
    """The distributions that frostline needs at run time, and those that they need."""
    found: dict[str, importlib.metadata.Distribution] = {}
    open_names = ["frostline"]
    while open_names:
        name = re.sub(r"[-_.]+", "-", open_names.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # wanted on another platform or by an older Python
        for requirement in found[name].requires or []:
            wanted, _, condition = requirement.partition(";")
            if "extra" not in condition or "hiredis" in requirement:
                open_names.append(re.split(r"[^\w.-]", wanted.strip(), maxsplit=1)[0])
    del found["frostline"]
    return found


def python_image() -> Path:
    """The interpreter, its standard library, and all that frostline depends on, at their own paths."""
    program = python_program()
    library = Path(sysconfig.get_path("stdlib"))
    files = {str(program): program}
    files |= {str(path): path for path in _below(library, _LEFT_OUT)}
    for distribution in _depended_on().values():
        for listed in distribution.files or []:
            path = Path(str(distribution.locate_file(listed)))
            if path.is_file() and ".." not in listed.parts:
                files[str(path)] = path
    links = {str(program), str(library), *(str(place) for place in _package_roots())}
    return image_of("python", files, links)


def _package_roots() -> list[Path]:
    return [Path(path) for path in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib")))]


def frostline_files() -> dict[str, Path]:
    """The package as `make build` made it: path in the guest -> file here."""
    generated = NATIVE_BUILD / "generated" / "frostline" / "v1"
    roots = {"agent": "agent", "controller": "controller", "native": "native/python", "wire": "proto/wire"}
    sources = {name: _REPOSITORY / folder for name, folder in roots.items()} | {"v1": generated}
    files: dict[str, Path] = {}
    for name, folder in sources.items():
        for path in _below(folder, ("__pycache__",)):
            files[f"{_PACKAGE}/{name}/{path.relative_to(folder)}"] = path
    extensions = [path for path in NATIVE_BUILD.glob("_frostline*.so") if is_elf(path)]
    pager = NATIVE_BUILD / "frostline-pager"
    if not extensions or not pager.exists() or not generated.is_dir():
        raise GuestError(f"{NATIVE_BUILD} lacks the extension, the pager or the generated modules; run make build")
    files[f"{_PACKAGE}/native/{extensions[0].name}"] = extensions[0]
    files[f"{_PACKAGE}/native/bin/frostline-pager"] = pager
    return files


def python_config(config: KernelConfig) -> KernelConfig:
    """The same guest with Python, frostline, and its agent's command."""
    script = f"#!{python_program()}\nfrom frostline.agent.main import main\n\nmain()\n"
    folders = [PACKAGE_FOLDER, *(str(path) for path in _package_roots())]
    return replace(
        config,
        added={**config.added, **frostline_files()},
        texts={**config.texts, AGENT: script},
        images=(*config.images, python_image()),
        environment={**config.environment, "PYTHONPATH": ":".join(folders), "NO_COLOR": "1"},
    )
