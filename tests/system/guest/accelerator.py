# SPDX-License-Identifier: Apache-2.0
"""Whether QEMU really runs a guest under KVM here: /dev/kvm that opens is no proof, so one is booted, once."""

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

from .cache import cache_folder, write_atomically
from .config import GuestConfig, Workload
from .errors import GuestError
from .process import QemuProcess

_DEVICE = Path("/dev/kvm")
_BOOT_LIMIT_SECONDS = 15


def _circumstances() -> dict[str, str]:
    """What the verdict depends on."""
    qemu = shutil.which("qemu-system-x86_64")
    if qemu is None:
        raise GuestError("qemu-system-x86_64 is not there; install qemu-system-x86")
    binary = os.stat(qemu)
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return {"boot_id": boot, "qemu": f"{qemu} {binary.st_size} {binary.st_mtime_ns}"}


def _boots_under_kvm() -> bool:
    config = GuestConfig(name="kvm-probe", memory_mib=128, vcpus=1, workload=Workload(probe=1))
    with tempfile.TemporaryDirectory(prefix="frostline-kvm-") as folder:
        qemu = QemuProcess(config, "kvm", Path(folder))
        try:
            return qemu.console.wait(lambda: bool(qemu.console.events("booted")), _BOOT_LIMIT_SECONDS)
        finally:
            qemu.end()


def kvm_works() -> bool:
    """The verdict for this boot of this machine, from the cache if it was reached before."""
    if not os.access(_DEVICE, os.R_OK | os.W_OK):
        return False
    verdict_file = cache_folder() / "kvm.json"
    circumstances = _circumstances()
    try:
        kept = json.loads(verdict_file.read_text())
        if {key: kept[key] for key in circumstances} == circumstances:
            return bool(kept["works"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # none yet, or of an older form: find out
    works = _boots_under_kvm()
    write_atomically(verdict_file, json.dumps({**circumstances, "works": works}).encode() + b"\n")
    return works


def choose_accelerator(config: GuestConfig) -> str:
    """What this guest is to run under: KVM where that works for its user, else TCG; or what its configuration says."""
    if config.accelerator != "auto":
        return config.accelerator
    if config.run_as_nobody and _DEVICE.exists():
        mode = _DEVICE.stat().st_mode
        if not (mode & stat.S_IROTH and mode & stat.S_IWOTH):
            return "tcg"
    return "kvm" if kvm_works() else "tcg"
