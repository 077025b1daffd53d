# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.bench``: measure, show a table, write JSON. A missed target does not fail the run."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import NoReturn

from rich.console import Console

from frostline.native import NativeError
from frostline.native.binary import pager_path
from tests.bench import report
from tests.bench.errors import BenchError
from tests.bench.machine import this_machine
from tests.bench.suite import FULL, QUICK, Suite
from tests.bench.victim import Programs


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less of everything: a look, not a figure to quote")
    parser.add_argument(
        "--json", type=Path, default=Path("bench-report.json"), help="where the figures go (%(default)s)"
    )
    parser.add_argument("--fault-threads", type=int, default=0, help="of the pager (its own default)")
    parser.add_argument(
        "--programs", type=Path, default=Path("build/native/bench"), help="folder of the bench programs"
    )
    parser.add_argument("--pager", type=Path, help="frostline-pager to measure (the installed one)")
    return parser.parse_args()


def _end(number: int, _: FrameType | None) -> NoReturn:
    sys.exit(128 + number)  # through every `with`: no process and no setting stays behind


def _programs(arguments: argparse.Namespace) -> Programs:
    cpus = sorted(os.sched_getaffinity(0))
    pager = arguments.pager or pager_path()
    return Programs(arguments.programs.resolve(), pager.resolve(), vm_cpu=cpus[0], mover_cpu=cpus[-1])


def main() -> int:
    arguments = _arguments()
    console = Console(width=None if sys.stdout.isatty() else 130)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    if os.geteuid() != 0:
        console.print("bench: needs root, to attach to a process and to set up zram", style="red")
        return 2
    machine = this_machine()
    report.show_machine(console, machine)
    try:
        with tempfile.TemporaryDirectory(prefix="frostline-bench-") as folder:
            suite = Suite(
                _programs(arguments),
                Path(folder),
                QUICK if arguments.quick else FULL,
                arguments.fault_threads,
                lambda what: console.print(f"[dim]measuring: {what}[/]"),
            )
            results = suite.run()
    except (BenchError, NativeError, FileNotFoundError) as error:
        console.print(f"bench: {error}", style="red", markup=False)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except subprocess.CalledProcessError as error:
        console.print(f"bench: {error}\n{error.stderr}", style="red", markup=False)
        return 1
    report.show(console, results)
    report.write(arguments.json, machine, os.getloadavg()[0], arguments.quick, results)
    console.print(f"written: {arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
