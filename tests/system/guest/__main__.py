# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.system.guest fetch | try`: get ready for guests; boot one and say how long things took."""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from .accelerator import kvm_works
from .config import GuestConfig, Workload
from .errors import GuestError
from .guest import Guest
from .initramfs import guest_initramfs
from .kernel import guest_kernel


def _fetch(refresh: bool) -> None:
    kernel = guest_kernel(refresh)
    initramfs = guest_initramfs(kernel)
    print(f"kernel     {kernel.image} ({kernel.package})")
    print(f"initramfs  {initramfs}")
    print(f"modules    {', '.join(path.stem for path in kernel.modules) or 'none'}")


def _try(memory_mib: int, seconds: int) -> int:
    """Returns the guest's errors."""
    print(f"kvm        {'works' if kvm_works() else 'does not run a guest here; tcg'}")
    config = GuestConfig(name="try", memory_mib=memory_mib, workload=Workload(writers=1))
    with tempfile.TemporaryDirectory(prefix="frostline-try-") as folder, Guest(config, Path(folder)) as guest:
        start = time.monotonic()
        guest.wait_booted()
        print(f"booted     {time.monotonic() - start:.1f} s")
        filled = guest.wait_filled()
        print(f"filled     {filled.filled_pages // 256} MiB in {filled.fill_ms / 1000:.1f} s")
        time.sleep(seconds)
        errors = guest.verify()
        status = guest.status()
        print(f"verified   {status.filled_pages} pages in {status.verify_ms / 1000:.1f} s, {errors} errors")
        print(f"resident   {guest.memfd_resident_bytes() >> 20} MiB of {memory_mib}")
        print(f"status     {status}")
        return errors


def main() -> int:
    """Exit code 0: as asked; 1: a failure, or guest errors."""
    parser = argparse.ArgumentParser(prog="python -m tests.system.guest", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="get a guest kernel and build the initramfs, where that is not done")
    fetch.add_argument("--refresh", action="store_true", help="ask apt for the newest kernel again")
    trial = commands.add_parser("try", help="boot a guest, fill it, verify it, and say how long each took")
    trial.add_argument("--memory-mib", type=int, default=256)
    trial.add_argument("--seconds", type=int, default=3, help="how long to let it run before verifying")
    chosen = parser.parse_args()
    try:
        if chosen.command == "fetch":
            _fetch(chosen.refresh)
            return 0
        return 0 if _try(chosen.memory_mib, chosen.seconds) == 0 else 1
    except GuestError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
