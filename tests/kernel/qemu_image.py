# SPDX-License-Identifier: Apache-2.0
"""This machine's QEMU for the guest, with what it boots: a real VMM under the kernel under test."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

from tests.system.guest.config import GuestConfig
from tests.system.guest.errors import GuestError
from tests.system.guest.initramfs import guest_initramfs
from tests.system.guest.kernel import guest_kernel
from tests.system.guest.tools import run_tool

from .boot import KernelConfig
from .images import image_of

_PROGRAM = "qemu-system-x86_64"
# What a machine of type "pc" without devices loads when it is given a kernel.
_FIRMWARE = ("bios-256k.bin", "linuxboot_dma.bin", "kvmvapic.bin")
VM_KERNEL = "/vm/vmlinuz"
VM_INITRAMFS = "/vm/initramfs"


def qemu_image() -> Path:
    """The program, its libraries and its firmware."""
    found = shutil.which(_PROGRAM)
    if found is None:
        raise GuestError(f"{_PROGRAM} is not there; install qemu-system-x86")
    program = Path(os.path.realpath(found))
    files = {str(program): program}
    folders = [Path(line) for line in run_tool([_PROGRAM, "-L", "help"], 30).split()]
    for name in _FIRMWARE:
        paths = [folder / name for folder in folders if (folder / name).is_file()]
        if not paths:
            raise GuestError(f"QEMU's firmware {name} is in none of {', '.join(map(str, folders))}")
        files[str(paths[0])] = paths[0]
    return image_of("qemu", files, files)


def qemu_config(config: KernelConfig) -> KernelConfig:
    """The same guest with QEMU, and a kernel and an initramfs for the VM in it."""
    kernel = guest_kernel()
    vm_files = {VM_KERNEL: kernel.image, VM_INITRAMFS: guest_initramfs(kernel)}
    return replace(config, added={**config.added, **vm_files}, images=(*config.images, qemu_image()))


def vm_command(vm: GuestConfig, serial: str) -> list[str]:
    """The QEMU command for a VM under KVM.

    ``serial`` names a pair of pipes, SERIAL.in and SERIAL.out; its monitor is on the socket SERIAL.monitor.
    """
    memory = f"memory-backend-memfd,id=ram0,size={vm.memory_mib}M,share=on"
    command = [_PROGRAM, "-name", vm.name, "-uuid", vm.uuid, "-machine", "pc,memory-backend=ram0"]
    command += ["-m", f"{vm.memory_mib}M", "-object", memory, "-smp", str(vm.vcpus)]
    command += ["-accel", "kvm", "-cpu", "host", "-no-user-config", "-nodefaults", "-display", "none", "-no-reboot"]
    command += ["-chardev", f"pipe,id=console,path={serial}", "-serial", "chardev:console"]
    command += ["-monitor", f"unix:{serial}.monitor,server=on,wait=off"]
    command += ["-kernel", VM_KERNEL, "-initrd", VM_INITRAMFS]
    return [*command, "-append", vm.kernel_command_line()]
