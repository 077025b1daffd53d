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


def _sources(*options: str) -> list[dict[str, str]]:
    """The package sources with the component main in the machine's own apt configuration, whatever form that has."""
    fields = ("REPO_URI", "RELEASE", "COMPONENT", "ORIGIN")
    form = "|".join(f"$({name})" for name in fields)
    command = ["apt-get", *options, "indextargets", "--format", form, "Created-By: Packages"]
    listed = run_tool(command, _QUERY_LIMIT_SECONDS).splitlines()
    rows = [dict(zip(fields, line.split("|"), strict=True)) for line in listed]
    return [row for row in rows if row["COMPONENT"] == "main"]


def debian_mirror() -> str:
    """The address of the Debian archive that the machine uses."""
    for row in _sources():  # only those whose lists have been fetched: they say who made them
        if row["ORIGIN"] == "Debian":
            return row["REPO_URI"]
    release = re.search(r"^VERSION_CODENAME=(\S+)$", Path("/etc/os-release").read_text(), re.MULTILINE)
    own_names = (*_SUITE_NAMES, *release.groups()) if release else _SUITE_NAMES
    found = [row["REPO_URI"] for row in _sources("--no-release-info") if row["RELEASE"] in own_names]
    if not found:
        raise GuestError(
            "apt's sources name no Debian archive (a source with the component main of this machine's own release), "
            "so there is no mirror to take a kernel from"
        )
    # Others have suites of the same names; the archive's folder is called debian on every mirror.
    return next((address for address in found if address.rstrip("/").endswith("/debian")), found[0])


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
