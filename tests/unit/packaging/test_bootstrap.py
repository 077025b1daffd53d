# SPDX-License-Identifier: Apache-2.0
"""A machine that lacks something, and cannot be given it, is told exactly what."""

from __future__ import annotations

import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BOOTSTRAP = ROOT / "deploy" / "bootstrap"
# What the script itself runs; nothing that it looks for, and no apt-get: so that nothing can be installed from here.
SHELL_TOOLS = ("bash", "dirname", "id", "sed", "head", "uname", "ldd", "grep")


@pytest.fixture
def bare_path(tmp_path: Path) -> Path:
    """A folder for PATH with the shell's tools only."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for tool in SHELL_TOOLS:
        found = shutil.which(tool)
        assert found is not None, f"{tool} is not on the path"
        (folder / tool).symlink_to(found)
    return folder


def run_system(path: Path) -> subprocess.CompletedProcess[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return subprocess.run(
        [bash, str(BOOTSTRAP / "system.sh")],
        env={"PATH": str(path), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_what_is_missing_is_listed_with_its_package(bare_path: Path) -> None:
    run = run_system(bare_path)
    assert run.returncode == 1
    for name, package in (
        ("cmake", "cmake"),
        ("lz4 library and headers", "liblz4-dev"),
        ("qemu-system-x86_64 (real guests)", "qemu-system-x86"),
        ("redis-server", "redis-server"),
    ):
        assert f"  - {name} (Debian: {package})" in run.stderr.splitlines()
    assert "run the same command again" in run.stderr


def test_what_is_there_is_not_listed(bare_path: Path) -> None:
    (bare_path / "cmake").symlink_to("/bin/true")
    assert "cmake" not in run_system(bare_path).stderr


def test_every_requirement_is_pinned_exactly() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        document = tomllib.load(file)
    requirements = [
        *document["build-system"]["requires"],
        *document["project"]["dependencies"],
        *document["project"]["optional-dependencies"]["dev"],
    ]
    assert len(requirements) > 20
    for requirement in requirements:
        name, pin, version = requirement.partition("==")
        assert pin, requirement
        assert name.strip() == name, requirement
        assert version.strip() == version, requirement
        assert "*" not in version, requirement


def test_nothing_that_overwrites_opentelemetrys_protobufs_is_wanted() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for package in ("grpcio-admin", "grpcio-csds", "xds-protos"):
        assert package not in text
