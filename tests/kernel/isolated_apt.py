# SPDX-License-Identifier: Apache-2.0
"""Debian packages of another suite than the machine's own, from the mirror that the machine uses, never installed.

This apt has its own lists, sources and cache, and knows of no installed package: nothing of the machine's changes.
"""

import re
from pathlib import Path

from tests.system.guest.errors import GuestError
from tests.system.guest.tools import run_tool

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_QUERY_LIMIT_SECONDS = 60
_DOWNLOAD_LIMIT_SECONDS = 600
_SUITE_NAMES = ("stable", "oldstable", "testing", "unstable", "sid")


def debian_mirror() -> str:
    """The address of the Debian archive in the machine's own apt configuration, whatever form that has."""
    shown = ["$(REPO_URI)", "$(RELEASE)", "$(CODENAME)", "$(COMPONENT)", "$(ORIGIN)"]
    listed = run_tool(
        ["apt-get", "indextargets", "--format", "|".join(shown), "Created-By: Packages"], _QUERY_LIMIT_SECONDS
    )
    release = re.search(r"^VERSION_CODENAME=(\S+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    own_names = (*_SUITE_NAMES, release.group(1) if release else "")
    for line in listed.splitlines():
        address, suite, codename, component, origin = line.split("|")
        # Who made the lists is only known when they have been fetched.
        if component == "main" and (suite in own_names or codename in own_names) and origin in ("Debian", "", shown[4]):
            return address
    raise GuestError(
        "apt's sources name no Debian archive (a source with the component main of this machine's own release), "
        "so there is no mirror to take a kernel from"
    )


class IsolatedApt:
    """An apt for one suite; its files are in a folder, which the caller removes when done."""

    def __init__(self, folder: Path, suite: str) -> None:
        """Fetches the suite's package lists. Raises GuestError."""
        self.suite = suite
        self._folder = folder
        for name in ("lists/partial", "cache/archives/partial"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        sources, status = folder / "sources.list", folder / "status"
        signed = f"[signed-by={_KEYRING}] " if _KEYRING.exists() else ""
        sources.write_text(f"deb {signed}{debian_mirror()} {suite} main\n")
        status.write_text("")
        self._options: list[str] = []
        for setting in (
            f"Dir::Etc::sourcelist={sources}",
            "Dir::Etc::sourceparts=/nonexistent",
            "Dir::Etc::preferences=/nonexistent",
            "Dir::Etc::preferencesparts=/nonexistent",
            f"Dir::State::Lists={folder / 'lists'}",
            f"Dir::State::status={status}",
            f"Dir::Cache={folder / 'cache'}",
            "APT::Sandbox::User=root",  # user _apt may be unable to write here
            "APT::Update::Post-Invoke-Success::=",
            "Acquire::Languages=none",
            "Acquire::Retries=3",
        ):
            self._options += ["-o", setting]
        # Without this a mirror that cannot be reached is only a warning.
        fetch = [*self._options, "-o", "APT::Update::Error-Mode=any"]
        run_tool(["apt-get", *fetch, "update"], _DOWNLOAD_LIMIT_SECONDS)

    def names(self, pattern: str) -> list[str]:
        """The packages whose whole name matches an (extended) regular expression."""
        found = run_tool(["apt-cache", *self._options, "search", "--names-only", f"^{pattern}$"], _QUERY_LIMIT_SECONDS)
        return sorted(line.split(" ", 1)[0] for line in found.splitlines() if line)

    def version(self, package: str) -> str:
        """The version of a package that would be taken."""
        shown = run_tool(["apt-cache", *self._options, "policy", package], _QUERY_LIMIT_SECONDS)
        candidate = re.search(r"^  Candidate: (\S+)$", shown, re.MULTILINE)
        if candidate is None or candidate.group(1) == "(none)":
            raise GuestError(f"{self.suite} has no package {package}")
        return candidate.group(1)

    def unpack(self, packages: list[str], tree: Path) -> None:
        """Download packages and unpack them into a folder."""
        archives = self._folder / "archives"
        archives.mkdir()
        run_tool(["apt-get", *self._options, "download", *packages], _DOWNLOAD_LIMIT_SECONDS, archives)
        for archive in sorted(archives.glob("*.deb")):
            run_tool(["dpkg", "-x", str(archive), str(tree)], _QUERY_LIMIT_SECONDS)
            archive.unlink()
