# SPDX-License-Identifier: Apache-2.0
"""Which packages are taken from which mirror, and what is said when none can be."""

import re
from pathlib import Path

import pytest

from tests.kernel import GuestError
from tests.kernel.debian import debian_kernel, newest_kernel
from tests.kernel.idle import unmet
from tests.kernel.isolated_apt import debian_mirror

_CODENAME = re.search(r"^VERSION_CODENAME=(\S+)$", Path("/etc/os-release").read_text(), re.MULTILINE)


def names(*releases: str, parts: tuple[str, ...] = ("binary", "modules")) -> list[str]:
    return [f"linux-{part}-{release}-cloud-amd64" for release in releases for part in parts]


def test_the_newest_whole_kernel_that_is_new_enough_is_taken() -> None:
    offered = names("7.2.12+deb13", "7.3.4+deb13", "7.3.11+deb13") + names("7.4.1+deb13", parts=("binary",))
    found = newest_kernel(offered)
    assert found == ("7.3.11+deb13-cloud-amd64", names("7.3.11+deb13"))
    assert newest_kernel(names("7.2.12+deb13", "6.19.14+deb13")) is None
    # As Debian packed kernels before, with everything in one; and what only looks like one.
    whole = newest_kernel(
        ["linux-image-7.10.1-cloud-amd64", "linux-image-7.9.1-cloud-amd64", "linux-image-cloud-amd64"]
    )
    assert whole == ("7.10.1-cloud-amd64", ["linux-image-7.10.1-cloud-amd64"])


def configure_apt(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, sources: str) -> None:
    (folder / "parts").mkdir()
    (folder / "lists").mkdir()
    (folder / "parts" / name).write_text(sources)
    settings = {"Dir::Etc::sourcelist": "/nonexistent", "Dir::Etc::sourceparts": folder / "parts"}
    settings["Dir::State::Lists"] = folder / "lists"
    (folder / "apt.conf").write_text("".join(f'{key} "{value}";\n' for key, value in settings.items()))
    monkeypatch.setenv("APT_CONFIG", str(folder / "apt.conf"))


@pytest.mark.skipif(_CODENAME is None, reason="not a Debian with a code name")
@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("own.list", "deb http://other.example/apt {codename} main\ndeb {mirror} {codename} main contrib\n"),
        ("own.sources", "Types: deb\nURIs: {mirror}\nSuites: {codename} {codename}-updates\nComponents: main\n"),
    ],
)
def test_the_mirror_is_the_one_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, form: str
) -> None:
    assert _CODENAME is not None
    text = form.format(mirror="http://mirror.example/debian", codename=_CODENAME.group(1))
    configure_apt(monkeypatch, tmp_path, name, text)
    assert debian_mirror() == "http://mirror.example/debian/"


@pytest.mark.skipif(_CODENAME is None, reason="not a Debian with a code name")
def test_without_network_and_cache_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert _CODENAME is not None
    configure_apt(monkeypatch, tmp_path, "own.list", f"deb http://127.0.0.1:9/debian {_CODENAME.group(1)} main\n")
    monkeypatch.setenv("FROSTLINE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(GuestError) as failure:
        debian_kernel()
    said = str(failure.value)
    assert str(tmp_path / "cache/kernel/debian.json") in said and "127.0.0.1:9" in said
    assert list((tmp_path / "cache/kernel").iterdir()) == [tmp_path / "cache/kernel/lock"]


def test_a_setting_that_a_kernel_did_not_take_is_named() -> None:
    fragment = "# words\nCONFIG_A=y\nCONFIG_B=8\n# CONFIG_C is not set\n# CONFIG_D is not set\n"
    assert unmet(fragment, "CONFIG_A=y\nCONFIG_B=8\n# CONFIG_C is not set\n") == []
    assert unmet(fragment, "CONFIG_B=16\nCONFIG_C=y\n") == ["CONFIG_A=y", "CONFIG_B=8", "# CONFIG_C is not set"]
