# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.kernel fetch | run`: get a kernel for tests; run one command inside it and end with its code."""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.system.guest.errors import GuestError
from tests.system.guest.kernel import GuestKernel

from .boot import Kernel, KernelConfig
from .contents import parse_added
from .debian import debian_kernel
from .idle import idle_kernel
from .left_out import must_say, silent


def _kernel(name: str, refresh: bool = False) -> GuestKernel:
    return idle_kernel() if name == "idle" else debian_kernel(refresh)


def _fetch(name: str, refresh: bool) -> int:
    kernel = _kernel(name, refresh)
    print(f"kernel     {kernel.package}: {kernel.image}")
    print(f"modules    {', '.join(path.stem for path in kernel.modules) or 'none'}")
    return 0


def _run(chosen: argparse.Namespace) -> int:
    config = KernelConfig(
        memory_mib=chosen.memory,
        vcpus=chosen.cpus,
        nodes=chosen.nodes,
        added=parse_added(chosen.add),
        command_line=tuple(chosen.append),
    )
    tested = _kernel(chosen.kernel)
    with (
        tempfile.TemporaryDirectory(prefix="frostline-kernel-") as folder,
        Kernel(config, Path(folder), tested) as kernel,
    ):
        release, *troubles = kernel.ready_text.strip().splitlines()
        print(f"[{release} booted in {kernel.boot_seconds:.1f} s]", *troubles, sep="\n", file=sys.stderr)
        running = kernel.start(chosen.command, chosen.timeout, dict(text.split("=", 1) for text in chosen.env))
        result = kernel.finish(running)
        sys.stdout.buffer.write(result.stdout_bytes)
        sys.stdout.buffer.flush()
        sys.stderr.buffer.write(result.stderr_bytes)
        sys.stderr.buffer.flush()
        ended = "over its limit" if result.over_limit else f"ended with {result.code}"
        print(f"[{ended} after {result.seconds:.1f} s]", file=sys.stderr)
        for text in chosen.get:
            name, _, target = text.partition(":")
            Path(target or Path(name).name).write_bytes(kernel.read(name))
        if chosen.console:
            sys.stderr.write((Path(folder) / "console.log").read_text(errors="replace"))
        if result.over_limit or result.code != 0:
            return 124 if result.over_limit else result.code if result.code >= 0 else 128 - result.code
        unsaid = silent(result, must_say(Path(chosen.command[0]).name, chosen.tried)) if chosen.tried else []
        for pattern in unsaid:
            print(f"error: passed, but no line of its output begins with: {pattern}", file=sys.stderr)
        return 1 if unsaid else 0


def main() -> int:
    """Exit code of ``run``: the command's, 128 + a signal, 124 over its limit, 125 if the guest failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel", description=__doc__)
    commands = parser.add_subparsers(dest="verb", required=True)
    fetch = commands.add_parser("fetch", help="get a kernel into the cache, if it is not there")
    fetch.add_argument("--kernel", choices=("debian", "idle"), default="debian", help="idle: built, with page_idle")
    fetch.add_argument("--refresh", action="store_true", help="ask the mirror for the newest again")
    run = commands.add_parser("run", help="boot, run one command inside, end with its code")
    run.add_argument("--kernel", choices=("debian", "idle"), default="debian", help="idle: built, with page_idle")
    run.add_argument("--memory", type=int, default=1024, metavar="MIB")
    run.add_argument("--cpus", type=int, default=2)
    run.add_argument("--nodes", type=int, default=1, help="NUMA nodes")
    run.add_argument("--timeout", type=float, default=120, metavar="SECONDS")
    run.add_argument("--add", action="append", default=[], metavar="FILE[:PATH]", help="bring in, default to /tests")
    run.add_argument("--get", action="append", default=[], metavar="PATH[:FILE]", help="bring out afterwards")
    run.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    tried = "comma-separated; a C test that passes must have tried all that it can with these, or that is a failure"
    run.add_argument("--tried", type=lambda text: text.split(","), default=[], metavar="TRACKERS", help=tried)
    run.add_argument("--append", action="append", default=[], metavar="WORD", help="to the kernel's command line")
    run.add_argument("--console", action="store_true", help="show the whole console afterwards")
    run.add_argument("command", nargs="+")
    chosen = parser.parse_args()
    try:
        return _fetch(chosen.kernel, chosen.refresh) if chosen.verb == "fetch" else _run(chosen)
    except GuestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 125


if __name__ == "__main__":
    sys.exit(main())
