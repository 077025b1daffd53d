# SPDX-License-Identifier: Apache-2.0
"""What a test guest is made of, and the QEMU command line that this gives."""

import uuid
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

Backend = Literal["memfd", "ram"]
Accelerator = Literal["auto", "kvm", "tcg"]

_KERNEL_BASE = (
    "console=ttyS0",
    "quiet",
    "loglevel=4",  # errors and an oops still show
    "panic=-1",  # with -no-reboot a panic ends QEMU
    "memhp_default_state=online",
    "mitigations=off",
    "nosoftlockup",  # an emulated CPU waiting for its pages is no news
    "rcupdate.rcu_cpu_stall_suppress=1",
    "no_timer_check",
    "swiotlb=noforce",  # 64 MiB of bounce buffers where memory may be plugged in above 4 GiB
)
# What the guest's own kernel and this harness's init need beside what is filled, measured with some to spare.
_KERNEL_MIB = 104
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


@dataclass(frozen=True)
class Workload:
    """Settings of guest-workload at boot; what they mean is said in workload/settings.h. ``mib`` None: most of RAM."""

    mib: int | None = None
    seed: int = 1
    zero_percent: int = 10
    same_percent: int = 5
    random_percent: int = 5
    huge_pages: int = 0
    threads: int = 0
    interval_ms: int = 500
    hot_mib: int = 8
    hot_write_percent: int = 10
    rate: int = 50
    rewrite_percent: int = 10
    writers: int = 0
    writer_rate: int = 500
    writer_write_percent: int = 50
    probe: int = 0

    def content_settings(self) -> list[str]:
        """The settings that page contents depend on, as ``NAME=VALUE``."""
        names = ("seed", "zero_percent", "same_percent", "random_percent")
        return [f"{name}={getattr(self, name)}" for name in names]


@dataclass(frozen=True)
class GuestConfig:
    """A test guest. Sizes are MiB."""

    name: str = "guest"
    uuid: str = field(default_factory=lambda: str(uuid.uuid4()))
    memory_mib: int = 256
    vcpus: int = 2
    workload: Workload = field(default_factory=Workload)
    backend: Backend = "memfd"
    share: bool = True
    hotplug_slots: int = 0
    max_memory_mib: int = 0  # 0: memory_mib + 4096 where there are slots
    run_as_nobody: bool = False
    sandbox: bool = False
    mem_lock: bool = False
    balloon: bool = False
    free_page_reporting: bool = False
    accelerator: Accelerator = "auto"
    extra_arguments: tuple[str, ...] = ()

    @property
    def fill_mib(self) -> int:
        """How much the workload fills."""
        if self.workload.mib is not None:
            return self.workload.mib
        return max(16, min(self.memory_mib * 4 // 5, self.memory_mib - _KERNEL_MIB))

    def memory_object(self, identity: str, size_mib: int) -> dict[str, Any]:
        """The memory backend of one region, as QMP's object-add takes it."""
        described: dict[str, Any] = {
            "qom-type": f"memory-backend-{self.backend}",
            "id": identity,
            "size": size_mib << 20,
        }
        if self.backend == "memfd" or self.share:
            described["share"] = self.share
        return described

    def _memory_arguments(self) -> list[str]:
        memory = f"size={self.memory_mib}M"
        if self.hotplug_slots:
            memory += f",slots={self.hotplug_slots},maxmem={self.max_memory_mib or self.memory_mib + 4096}M"
        described = self.memory_object("ram0", self.memory_mib)
        kind = str(described.pop("qom-type"))
        named = {True: "on", False: "off"}
        options = [f"{key}={named[value] if isinstance(value, bool) else value}" for key, value in described.items()]
        return ["-m", memory, "-object", ",".join([kind, *options])]

    def kernel_command_line(self) -> str:
        """What the guest's kernel is given, the workload's settings included."""
        settings = {setting.name: getattr(self.workload, setting.name) for setting in fields(self.workload)}
        settings["mib"] = self.fill_mib
        return " ".join([*_KERNEL_BASE, *(f"fl.{name}={value}" for name, value in settings.items())])

    def arguments(self, accelerator: str, image: Path, initramfs: Path, serial_fd: int, qmp_fd: int) -> list[str]:
        """The QEMU command, but for who runs it. The two descriptors are connected sockets that QEMU inherits."""
        kvm = accelerator == "kvm"
        command = ["qemu-system-x86_64", "-name", self.name, "-uuid", self.uuid]
        command += ["-machine", "pc,memory-backend=ram0", "-no-user-config", "-nodefaults", "-display", "none"]
        command += ["-accel", "kvm" if kvm else "tcg,thread=multi,tb-size=64", "-cpu", "host" if kvm else "max"]
        command += ["-smp", str(self.vcpus), *self._memory_arguments()]
        command += ["-chardev", f"socket,id=console,fd={serial_fd}", "-serial", "chardev:console"]
        command += ["-chardev", f"socket,id=control,fd={qmp_fd}", "-mon", "chardev=control,mode=control"]
        command += ["-no-reboot", "-kernel", str(image), "-initrd", str(initramfs)]
        command += ["-append", self.kernel_command_line()]
        if self.balloon or self.free_page_reporting:
            reporting = "on" if self.free_page_reporting else "off"
            command += ["-device", f"virtio-balloon-pci,id=balloon0,free-page-reporting={reporting}"]
        if self.mem_lock:
            command += ["-overcommit", "mem-lock=on"]
        if self.sandbox:
            command += ["-sandbox", _SANDBOX]
        return [*command, *self.extra_arguments]
