# SPDX-License-Identifier: Apache-2.0
"""Finding QEMU processes: recorded command lines, and a /proc made of files."""

from __future__ import annotations

from pathlib import Path

import pytest

from frostline.agent.discovery import Discovery, Vmm, is_vmm, parse_command_line, vm_ids
from frostline.agent.procfs import ProcessId, parse_meminfo, parse_stat

UUID = "5f0c2c43-7b0a-4f4e-9d0e-2a6f7c3f7d11"

# As libvirt 9 starts a guest (shortened in its middle), Proxmox 8, and by hand.
LIBVIRT = (
    "/usr/bin/qemu-system-x86_64 -name guest=web-7,debug-threads=on -S -object "
    '{"qom-type":"secret","id":"masterKey0","format":"raw","file":"/var/lib/libvirt/qemu/domain-3-web-7/key.aes"} '
    "-machine pc-q35-7.2,usb=off,dump-guest-core=off,memory-backend=pc.ram -accel kvm -cpu host,migratable=on "
    '-m 4096 -object {"qom-type":"memory-backend-memfd","id":"pc.ram","share":true,"prealloc":false,'
    '"size":4294967296} -overcommit mem-lock=off -smp 4,sockets=4,cores=1,threads=1 '
    f"-uuid {UUID} -no-user-config -nodefaults -chardev socket,id=charmonitor,fd=33,server=on,wait=off"
).split(" ")
PROXMOX = (
    "/usr/bin/kvm -id 101 -name db,debug-threads=on -no-shutdown -chardev socket,id=qmp,path=/var/run/qemu/101.qmp "
    f"-pidfile /var/run/qemu-server/101.pid -daemonize -smbios type=1,uuid={UUID.upper()} -smp 2 -m 2048"
).split(" ")
BY_HAND = ["qemu-system-x86_64", "-m", "512", "-nographic"]


@pytest.mark.parametrize(
    ("argv", "name", "uuid"),
    [
        (LIBVIRT, "web-7", UUID),
        (PROXMOX, "db", UUID),
        (BY_HAND, "", ""),
        (["qemu", "-name", "a,,b"], "a,b", ""),
        (["qemu", "-name", "guest=x,,y,process=z"], "x,y", ""),
        (["qemu", "-name", "debug-threads=on"], "", ""),
        (["qemu", "-name", "first", "-name", "second"], "second", ""),
        (["qemu", "-name"], "", ""),
        (["qemu", "-uuid", "not-a-uuid", "-name", "x"], "x", ""),
        (["qemu", "-uuid", UUID.replace("-", ""), "--name", "y"], "y", UUID),
        (["qemu", "-name", "evil\x1b[31m\nname"], "evil__31m_name", ""),
        (["qemu", "-name", "n" * 500], "n" * 128, ""),
    ],
)
def test_name_and_uuid_of_recorded_command_lines(argv: list[str], name: str, uuid: str) -> None:
    found = parse_command_line(argv)
    assert (found.name, found.uuid) == (name, uuid)


@pytest.mark.parametrize(
    ("value", "mebibytes"),
    [
        ("4096", 4096),
        ("4G", 4096),
        ("size=256M", 256),
        ("size=4194304k,slots=255,maxmem=16G", 4096),
        ("512,slots=2", 512),
        ("1T", 1 << 20),
        ("much", 0),
        ("", 0),
        ("9" * 50, 0),
    ],
)
def test_memory_of_recorded_options(value: str, mebibytes: int) -> None:
    assert parse_command_line(["qemu", "-m", value]).memory_bytes == mebibytes << 20


@pytest.mark.parametrize(
    ("executable", "comm", "argv", "expected"),
    [
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86", ["x", "-m"], True),
        ("/usr/libexec/qemu-kvm", "qemu-kvm", ["qemu-kvm", "-m"], True),
        ("/usr/bin/qemu-system-x86_64 (deleted)", "CPU 0/KVM", ["x", "-m"], True),
        ("", "qemu-system-x86", ["/usr/bin/qemu-system-x86_64", "-m"], True),
        ("", "qemu-system-x86", ["/bin/sh", "-c"], False),
        ("/bin/grep", "grep", ["grep", "qemu-system-x86_64"], False),
        ("/usr/bin/qemu-system-x86_64", "qemu-system-x86", ["qemu-system-x86_64"], False),
        ("/usr/bin/qemu-img", "qemu-img", ["qemu-img", "info"], False),
    ],
)
def test_what_counts_as_a_vmm(executable: str, comm: str, argv: list[str], expected: bool) -> None:
    assert is_vmm(executable, comm, argv) is expected


def test_start_time_is_read_past_a_name_with_brackets_and_spaces() -> None:
    fields = ["S", "77"] + ["0"] * 17 + ["123456", "9"]
    assert parse_stat(f"4711 (evil) S 1 (x y) {' '.join(fields)}") == (77, 123456)


def test_meminfo() -> None:
    found = parse_meminfo("MemTotal:       1024 kB\nMemFree: 5 kB\nMemAvailable:    512 kB\nHugePages_Total: 0\n")
    assert (found.total_bytes, found.available_bytes) == (1 << 20, 1 << 19)
    assert parse_meminfo("garbage\nMemTotal: x kB\n").total_bytes == 0


def vmm(pid: int, uuid: str) -> Vmm:
    return Vmm(ProcessId(pid, 10 * pid), f"vm-{pid}", uuid, "/usr/bin/qemu-system-x86_64")


def test_two_vms_with_one_uuid_both_get_the_pid_form() -> None:
    one, two, three = vmm(1, UUID), vmm(2, UUID), vmm(3, "")
    ids, doubled = vm_ids([one, two, three], "node")
    assert ids == {one.process: "node/1-10", two.process: "node/2-20", three.process: "node/3-30"}
    assert doubled == {UUID}
    assert vm_ids([one], "node") == ({one.process: UUID}, set())


class FakeProc:
    """A /proc of files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, pid: int, argv: list[str], *, start: int = 100, parent: int = 1) -> None:
        folder = self.root / str(pid)
        folder.mkdir(exist_ok=True)
        fields = ["S", str(parent)] + ["0"] * 17 + [str(start), "0"]
        name = Path(argv[0]).name[:15]
        (folder / "stat").write_text(f"{pid} ({name}) {' '.join(fields)}")
        (folder / "comm").write_text(f"{name}\n")
        (folder / "cmdline").write_bytes("\0".join(argv).encode() + b"\0")
        exe = folder / "exe"
        exe.unlink(missing_ok=True)
        exe.symlink_to(argv[0])

    def remove(self, pid: int) -> None:
        for path in (self.root / str(pid)).iterdir():
            path.unlink()
        (self.root / str(pid)).rmdir()


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(tmp_path)


def test_sweep_follows_processes_that_come_go_and_reuse_a_pid(proc: FakeProc) -> None:
    proc.add(10, LIBVIRT)
    proc.add(11, ["/bin/sleep", "5"])
    discovery = Discovery(proc.root)
    assert [found.process for found in discovery.sweep()] == [ProcessId(10, 100)]
    proc.add(12, PROXMOX, start=200)
    assert [found.name for found in discovery.sweep()] == ["web-7", "db"]
    proc.remove(10)
    proc.add(10, LIBVIRT, start=999)
    assert ProcessId(10, 999) in [found.process for found in discovery.sweep()]
    proc.remove(10)
    proc.remove(12)
    assert discovery.sweep() == []


def test_a_shell_that_execs_a_vmm_is_seen(proc: FakeProc) -> None:
    proc.add(10, ["/bin/sh", "-c", "exec qemu"])
    discovery = Discovery(proc.root)
    assert discovery.sweep() == []
    proc.add(10, LIBVIRT)
    assert [found.name for found in discovery.sweep()] == ["web-7"]


def test_a_fork_of_a_vmm_is_no_second_vm(proc: FakeProc) -> None:
    proc.add(10, LIBVIRT)
    proc.add(11, LIBVIRT, start=150, parent=10)
    discovery = Discovery(proc.root)
    assert [found.process.pid for found in discovery.sweep()] == [10]
    proc.remove(10)
    proc.add(11, LIBVIRT, start=150, parent=1)
    assert [found.process.pid for found in discovery.sweep()] == [11]
