# SPDX-License-Identifier: Apache-2.0
"""Holds swap on zram for as long as its standard input is open, then puts everything back.

A process of its own, in its own session and deaf to signals: however the bench ends, by Ctrl-C or by kill -9, its
end of the pipe closes and the machine is left as it was. Says ``ready DEVICE`` or ``skip REASON``, one line.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.bench.errors import Skipped

CONTROL: Final = Path("/sys/class/zram-control")
PAGE_CLUSTER: Final = Path("/proc/sys/vm/page-cluster")
ZSWAP: Final = Path("/sys/module/zswap/parameters/enabled")


def _run(*command: str) -> None:
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except FileNotFoundError as error:
        raise Skipped(f"{command[0]} is not there (Debian package: util-linux)") from error
    except subprocess.CalledProcessError as error:
        raise Skipped(f"{' '.join(command)}: {error.stderr.strip()}") from error


def _write(path: Path, value: str) -> None:
    try:
        path.write_text(value)
    except OSError as error:
        raise Skipped(f"cannot write {value} to {path}: {error.strerror}") from error


class Keeper:
    """What was changed, and how to change it back."""

    def __init__(self) -> None:
        self._stack = contextlib.ExitStack()

    def set_up(self, size_bytes: int) -> str:
        """Device that is swapped to now. Raises Skipped with the reason."""
        if os.geteuid() != 0:
            raise Skipped("setting up zram needs root")
        name = self._device()
        folder = Path("/sys/block") / name
        if "lz4" not in (folder / "comp_algorithm").read_text().replace("[", " ").replace("]", " ").split():
            raise Skipped(f"{name} cannot compress with lz4: {(folder / 'comp_algorithm').read_text().strip()}")
        self._stack.callback(_write, folder / "reset", "1")
        _write(folder / "comp_algorithm", "lz4")
        _write(folder / "disksize", str(size_bytes))
        self._keep_setting(PAGE_CLUSTER, "0")
        if ZSWAP.exists():
            self._keep_setting(ZSWAP, "N")  # it would stand between memory and zram
        _run("mkswap", f"/dev/{name}")
        _run("swapon", "--priority", "32767", f"/dev/{name}")
        self._stack.callback(_run, "swapoff", f"/dev/{name}")
        return name

    def put_back(self) -> None:
        self._stack.close()

    def _keep_setting(self, path: Path, value: str) -> None:
        self._stack.callback(_write, path, path.read_text().strip())
        _write(path, value)

    def _device(self) -> str:
        """A device of our own; one that is there already is left alone, in use or not."""
        if not CONTROL.is_dir():
            with contextlib.suppress(Skipped):
                _run("modprobe", "zram", "num_devices=0")
        try:
            number = (CONTROL / "hot_add").read_text().strip()
        except OSError as error:
            raise Skipped(f"no zram on this kernel ({CONTROL / 'hot_add'}: {error.strerror})") from error
        self._stack.callback(_write, CONTROL / "hot_remove", number)
        if not Path(f"/dev/zram{number}").exists():
            raise Skipped(f"/dev/zram{number} did not appear")
        return f"zram{number}"


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    keeper = Keeper()
    try:
        try:
            print("ready", keeper.set_up(int(sys.argv[1])), flush=True)
        except Skipped as reason:
            print("skip", str(reason).replace("\n", " "), flush=True)
        sys.stdin.read()
    finally:
        try:
            keeper.put_back()
        except Skipped as reason:
            print(f"bench: zram was not put back: {reason}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
