# SPDX-License-Identifier: Apache-2.0
"""The agent with real guests: VMs come and go, pagers and agents die, and no guest ever reads a wrong byte."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import GuestFactory, why_no_guest
from tests.system.agent_rig import ENFORCE, AgentRig, wait_for
from tests.system.guest import Guest, GuestConfig, Workload

MIB = 1 << 20
# Guests boot under emulation, beside whatever else this machine is doing.
pytestmark = pytest.mark.timeout(300)
WORKLOAD = Workload(mib=96, hot_mib=4)


def config(name: str) -> GuestConfig:
    # Names are unique on this machine, so that agents of other tests leave these VMs alone.
    return GuestConfig(name=f"{name}-{os.getpid()}", memory_mib=224, workload=WORKLOAD)


def filled(guest_factory: GuestFactory, name: str) -> Guest:
    guest = guest_factory(config(name))
    guest.wait_filled()
    return guest


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """One guest for several tests: each one's agent finds it as the last one's left it."""
    reason = why_no_guest()
    if reason is not None:
        pytest.skip(reason)
    with Guest(config("shared"), tmp_path_factory.mktemp("guest")) as guest:
        guest.wait_filled()
        yield guest


def alive(pid: int) -> bool:
    """Whether it still runs; one that nobody has reaped yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_line(pid: int) -> dict[str, str]:
    """A pager's options and their values."""
    words = Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0").split("\0")[1:]
    return dict(zip(words[::2], words[1::2], strict=True))


def open_memfds(pid: int) -> set[str]:
    """Names of what the VMM holds open that we could have injected."""
    names = {os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()}
    return {name for name in names if "userfaultfd" in name or "memfd:frostline" in name}


def test_evicts_by_a_local_policy_survives_a_dead_pager_and_detaches_without_a_trace(
    guest_factory: GuestFactory,
) -> None:
    guest = filled(guest_factory, "loop")
    name = guest.config.name
    before = guest.memfd_resident_bytes()
    with AgentRig([name]) as rig:
        rig.start()
        vm = rig.wait_evicted(name, 48 * MIB)
        assert vm["grant"]["mode"] == "enforce" and vm["pager"]["attach_stop_seconds"] < 0.01
        assert guest.memfd_resident_bytes() < before - 32 * MIB

        first = int(vm["pager"]["pid"])
        os.kill(first, signal.SIGKILL)
        vm = rig.wait_vm(name, lambda vm: vm["pager_restarts"] == 1, "served by the next pager")
        assert vm["pager"]["pid"] != first and vm["pager"]["takeovers"] == 1
        assert vm["last_takeover_seconds"] < 1.0, rig.log_tail()  # the promise is 0.2 s; machines under test are busy
        guest.wait_rounds(2, timeout=30)
        assert guest.verify() == 0

        rig.wait_evicted(name, 48 * MIB)
        assert rig.ask("drain", name, "--wait", "--timeout", "60s").returncode == 0
        time.sleep(1.5)  # several budget sets later
        drained = rig.vm(name)
        assert drained["held"] == "drained" and drained["pager"]["evicted_pages"] == 0
        assert rig.ask("detach", name, "--wait", "--timeout", "60s").returncode == 0
        assert rig.vm(name)["held"] == "detached" and not rig.vm(name)["pager"]
        assert not open_memfds(guest.pid)
        assert guest.memfd_resident_bytes() >= before - 8 * MIB

        assert rig.ask("resume", name).returncode == 0
        last = int(rig.wait_served(name)["pager"]["pid"])
        assert rig.stop() == 0
        assert rig.logged("the agent leaves") and alive(last)
        assert guest.verify() == 0


def test_two_vms_come_and_go_and_an_excluded_one_is_never_touched(guest_factory: GuestFactory) -> None:
    kept = filled(guest_factory, "kept")
    one = filled(guest_factory, "one")
    policy = ENFORCE + f"vms:\n  {kept.config.name}: {{exclude: true}}\n"
    names = [f"{name}-{os.getpid()}" for name in ("kept", "one", "two")]
    with AgentRig(names, policy=policy) as rig:
        rig.start()
        rig.wait_evicted(one.config.name, 32 * MIB)
        two = filled(guest_factory, "two")
        rig.wait_evicted(two.config.name, 32 * MIB)
        excluded = rig.vm(kept.config.name)
        assert excluded["phase"] == "idle" and not excluded["wanted"] and not excluded["pager"]
        assert excluded["memory_bytes"] == 224 * MIB
        assert not open_memfds(kept.pid)

        pagers = {name: int(vm["pager"]["pid"]) for name, vm in rig.vms().items() if vm["pager"]}
        gone_pid = one.pid
        one.kill()
        wait_for("the ended VM to be forgotten", lambda: one.config.name not in rig.vms())
        wait_for("its pager to end", lambda: not alive(pagers[one.config.name]))
        assert not list((rig.run_dir / "pagers").glob(f"{gone_pid}-*.sock"))
        assert alive(pagers[two.config.name])
        assert two.verify() == 0 and kept.verify() == 0

        # SIGTERM with --detach-on-exit is another agent's start below; this one leaves its pager to it.
        assert rig.stop() == 0
        rig.start("--detach-on-exit")
        rig.wait_vm(two.config.name, lambda vm: vm["pager"]["pid"] == pagers[two.config.name], "adopted")
        assert rig.stop(60) == 0
        assert not open_memfds(two.pid) and not alive(pagers[two.config.name])
        assert two.verify() == 0


def test_a_killed_agents_pager_serves_on_and_is_adopted(guest: Guest) -> None:
    name = guest.config.name
    with AgentRig([name]) as rig:
        rig.start()
        vm = rig.wait_evicted(name, 32 * MIB)
        pager = int(vm["pager"]["pid"])
        rig.kill()
        assert guest.verify() == 0, "nobody but the pager is there to serve it"
        assert alive(pager)
        rig.start()
        vm = rig.wait_served(name)
        assert int(vm["pager"]["pid"]) == pager and vm["pager_restarts"] == 0
        assert rig.logged("adopted the living pager")
        # An adopted pager is no child of the new agent; its death must be seen all the same.
        os.kill(pager, signal.SIGKILL)
        vm = rig.wait_vm(name, lambda vm: vm["pager_restarts"] == 1, "served by the next pager")
        assert vm["pager"]["pid"] != pager and 0 < vm["last_takeover_seconds"] < 20.0
        assert guest.verify() == 0
        # A polite release is the same path: the next one takes over.
        second = int(vm["pager"]["pid"])
        assert rig.ask("release", name).returncode == 0
        rig.wait_vm(name, lambda vm: vm["pager"]["pid"] not in (0, pager, second), "handed over")
        assert guest.verify() == 0


def test_a_pager_and_the_agent_dead_at_once_leave_the_vm_waiting_not_wrong(guest: Guest) -> None:
    name = guest.config.name
    with AgentRig([name]) as rig:
        rig.start()
        pager = int(rig.wait_evicted(name, 32 * MIB)["pager"]["pid"])
        rig.kill()
        os.kill(pager, signal.SIGKILL)
        time.sleep(1.0)
        rig.start()
        vm = rig.wait_vm(name, lambda vm: vm["pager"] and vm["pager"]["pid"] not in (0, pager), "served again")
        assert vm["pager"]["takeovers"] >= 1
        assert guest.verify() == 0


def test_a_vm_without_shared_memory_is_refused_with_reason_and_probe_says_so(guest_factory: GuestFactory) -> None:
    name = f"private-{os.getpid()}"
    guest = guest_factory(GuestConfig(name=name, memory_mib=160, backend="ram", share=False, workload=Workload(mib=16)))
    guest.wait_booted()
    with AgentRig([name]) as rig:
        rig.start()
        vm = rig.wait_vm(name, lambda vm: vm["phase"] == "refused", "refused")
        assert vm["refusal"] == "not_shared_memfd" and "memfd" in vm["refusal_detail"]
        assert rig.logged("not served")[0]["refusal"] == "not_shared_memfd"
        assert not open_memfds(guest.pid)
        assert "frostline-pager" not in " ".join(p.name for p in (rig.run_dir / "pagers").iterdir())
        answer = rig.ask("status")
        assert answer.returncode == 0 and "not served" in answer.stdout
    probe = AgentRig([]).ask_probe()
    finding = next(vmm for vmm in probe["vmms"] if vmm["name"] == name)
    assert finding["refusal"] == "not_shared_memfd" and finding["sentence"]
    assert finding["tracker"] == "" and not any(tracker["chosen"] for tracker in finding["trackers"])
    assert [tracker["name"] for tracker in probe["trackers"] if tracker["chosen"]] == [probe["tracker"]]


def test_the_tracker_is_chosen_by_the_config_and_said_everywhere(guest: Guest) -> None:
    name = guest.config.name
    with AgentRig([name], limits="allow_evict: true\ntrackers: [zap]\n") as rig:
        rig.start()
        vm = rig.wait_evicted(name, 16 * MIB)
        assert (vm["pager"]["tracker"], vm["pager"]["freeze_method"]) == ("zap", "wp")
        first = int(vm["pager"]["pid"])
        assert command_line(first)["--trackers"] == "zap"
        # It asks the agent, whose limits file is none of its own.
        probe = rig.ask_probe()
        assert probe["trackers_wanted"] == "zap" and probe["trackers_from"].startswith("the running agent")
        finding = next(vmm for vmm in probe["vmms"] if vmm["name"] == name)
        assert finding["tracker_in_use"] and (finding["tracker"], finding["freeze_method"]) == ("zap", "wp")
        assert finding["tracker_why"] == "zap is in use; the first of zap that is possible here"

        # A bad list is said, and changes nothing; a good one is for pagers that start later.
        assert rig.process is not None
        rig.write_limits([name], "allow_evict: true\ntrackers: [zap, zap]\n")
        rig.process.send_signal(signal.SIGHUP)
        rejected = "the limits file is rejected; the last good one stays in force"
        wait_for("the list to be rejected", lambda: rig.logged(rejected))
        assert "trackers: 'zap' is in the list twice" in rig.logged(rejected)[0]["why"]
        rig.write_limits([name], "allow_evict: true\ntrackers: [rwp, zap]\n")
        rig.process.send_signal(signal.SIGHUP)
        said = "other trackers for pagers that start from now on"
        wait_for("the new list", lambda: any(str(line.get("event")).startswith(said) for line in rig.log()))
        assert int(rig.vm(name)["pager"]["pid"]) == first
        assert rig.ask_probe()["trackers_wanted"] == "rwp,zap"
        what_if = rig.ask_probe("--trackers", "zap")
        assert (what_if["trackers_wanted"], what_if["trackers_from"]) == ("zap", "--trackers")
        assert rig.ask("release", name).returncode == 0
        vm = rig.wait_vm(name, lambda vm: vm["pager"]["pid"] not in (0, first) and vm["pager"]["scans"], "handed over")
        assert command_line(int(vm["pager"]["pid"]))["--trackers"] == "rwp,zap"
        # While pages are away memory stays registered as it is, whatever the new list prefers.
        assert (vm["pager"]["tracker"], vm["pager"]["freeze_method"]) == ("zap", "wp")
        assert guest.verify() == 0


def test_two_agents_on_one_host(guest: Guest) -> None:
    name = guest.config.name
    with AgentRig([name]) as first, AgentRig([name]) as second:
        first.start()
        first.wait_served(name)
        # The same run folder: refused, and it says by whom it is held.
        assert second.start(run_dir=first.run_dir).wait(30) == 5
        assert f"another agent (pid {first.process.pid if first.process else 0})" in second.log_tail()
        # Another run folder: it sees the VM, and that it is somebody else's.
        second.start()
        vm = second.wait_vm(name, lambda vm: vm["phase"] == "foreign", "seen as another agent's")
        assert vm["refusal"] == "already_served" and vm["refusal_detail"]
        assert vm["pager"]["pid"] == first.vm(name)["pager"]["pid"]
        failed = second.ask("drain", name)
        assert failed.returncode == 1 and "another agent" in failed.stderr
        assert first.wait_evicted(name, 32 * MIB)
        assert guest.verify() == 0


def test_metrics_can_be_scraped_and_are_never_negative(guest: Guest) -> None:
    name = guest.config.name
    with AgentRig([name]) as rig:
        rig.start()
        rig.wait_evicted(name, 16 * MIB)
        address = rig.logged("the agent runs")[0]["metrics"]
        text = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    values = [float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line and not line.startswith("#")]
    assert values and min(values) >= 0
    evicted = [line for line in text.splitlines() if line.startswith("frostline_vm_evicted_bytes{")]
    assert any(f'vm_name="{name}"' in line and float(line.rsplit(" ", 1)[1]) >= 16 * MIB for line in evicted)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["status"], 4, "cannot reach an agent"),
        (["drain", "x"], 4, "cannot reach an agent"),
    ],
)
def test_exit_codes_without_an_agent(arguments: list[str], code: int, says: str) -> None:
    with AgentRig([]) as rig:
        answer = rig.ask(*arguments)
        assert answer.returncode == code and says in answer.stderr


def test_bad_files_at_start_and_at_reload(guest: Guest) -> None:
    name = guest.config.name
    with AgentRig([name]) as rig:
        rig.limits_path.write_text("version: 1\nmax_awya: 10%\n")
        assert rig.start().wait(30) == 2
        assert "max_awya" in rig.log_tail()
        rig.write_limits([name])
        rig.policy_path.write_text("version: 1\nclasses: {standard: {floor: -5}}\n")
        assert rig.start().wait(30) == 2
        assert "floor" in rig.log_tail()
        rig.policy_path.write_text(ENFORCE)
        process = rig.start()
        rig.wait_evicted(name, 48 * MIB)
        # A bad reload keeps the last good one; a good one tightens at once.
        rig.limits_path.write_text("version: [1\n")
        process.send_signal(signal.SIGHUP)
        wait_for("the rejection", lambda: rig.logged("the limits file is rejected; the last good one stays in force"))
        assert rig.vm(name)["grant"]["bytes"] > 0
        rig.write_limits([name], "allow_evict: false\n")
        process.send_signal(signal.SIGHUP)
        vm = rig.wait_vm(name, lambda vm: vm["grant"]["bytes"] == 0, "without a budget")
        assert vm["grant"]["reason"] == "limited_locally" and "allow_evict" in vm["grant"]["why"]
        rig.policy_path.write_text("nonsense")
        wait_for("the rejection", lambda: rig.logged("the policy file is rejected; the last good one stays in force"))
        unknown = rig.ask("drain", "nobody")
        assert unknown.returncode == 3 and "no VM" in unknown.stderr
        status = rig.ask("status", "--json")
        assert json.loads(status.stdout)["agent"]["allow_evict"] is False
