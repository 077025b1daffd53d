# SPDX-License-Identifier: Apache-2.0
"""Each command: what it asks the controller, what it prints for people, and what for scripts."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest

from frostline.v1 import common_pb2, operator_pb2
from tests.unit.cli.conftest import Command
from tests.unit.cli.servicer import RunningServer


def test_hosts_for_people(frostline: Command) -> None:
    run = frostline("hosts")
    assert run.code == 0
    head, first, second, _blank, total, note = run.out.splitlines()
    assert head.split()[:2] == ["HOST", "STATE"]
    assert first.split()[:2] == ["node-a", "connected"]
    assert "suspect: frozen" in second and "17 of 18" in second
    assert total == "2 hosts · 5 VMs · 1.19 GiB away · 886 MiB of RAM saved · policy version 12"
    assert note == "node-b.rack-12.example: two agents say that they are it"


def test_hosts_for_scripts(frostline: Command) -> None:
    document = frostline("hosts", "--json").json
    assert [host["node_id"] for host in document["hosts"]] == ["node-a", "node-b.rack-12.example"]
    assert document["hosts"][0]["evicted_bytes"] == 1216 * 2**20
    assert document["store_available"] is True and document["policy_version"] == 12


def test_hosts_warns_of_a_frozen_fleet_and_a_lost_store(frostline: Command, server: RunningServer) -> None:
    server.servicer.fleet_frozen, server.servicer.store_available = True, False
    out = frostline("hosts").out
    assert "the fleet is frozen" in out and "state store is away" in out


def test_empty_lists_say_what_to_do(frostline: Command, server: RunningServer) -> None:
    server.servicer.hosts, server.servicer.vms, server.servicer.policies = [], [], []
    assert "start frostline-agent" in frostline("hosts").out
    assert "no VM is known" in frostline("vms").out
    assert "no policy has been put" in frostline("policy", "list").out


def test_vms_show_desired_and_in_force_and_why(frostline: Command) -> None:
    run = frostline("vms")
    rows = {line.split()[0]: line for line in run.out.splitlines()[1:6]}
    assert rows["web-2"].split()[-5:] == ["620", "MiB", "300", "MiB", "granted"]
    assert "443 MiB" in rows["web-1"]  # 608 away, less 163 of pool and 2 of metadata
    assert rows["gpu-1"].endswith("unsafe: passthrough")
    assert rows["db-1"].endswith("excluded")
    assert any("plan 620 MiB" in row and row.endswith("mode: plan") for row in rows.values())


def test_numbers_are_right_aligned(frostline: Command) -> None:
    lines = frostline("vms").out.splitlines()
    end = lines[0].index("AWAY") + len("AWAY")
    for line in lines[1:6]:
        assert line[end - 1] != " " and line[end] == " "


def test_vms_of_one_host(frostline: Command, server: RunningServer) -> None:
    document = frostline("vms", "--host", "node-b", "--json").json
    assert {vm["node_id"] for vm in document["vms"]} == {"node-b"}
    assert server.servicer.requests[-1] == operator_pb2.ListVmsRequest(node_id="node-b")


@pytest.mark.parametrize("width", [60, 80, 100, 120, 160, 200])
@pytest.mark.parametrize("command", [["hosts"], ["vms"], ["vm", "web-1"], ["policy", "list"]])
def test_nothing_is_wider_than_the_terminal(frostline: Command, command: list[str], width: int) -> None:
    for locale in ("C.UTF-8", "C"):
        for line in frostline(*command, width=width, LANG=locale).out.splitlines():
            assert len(line) <= width


@pytest.mark.parametrize("width", [60, 80])
def test_narrow_tables_keep_what_matters(frostline: Command, width: int) -> None:
    head, web_1 = frostline("vms", width=width).out.splitlines()[:2]
    for column in ("VM", "AWAY", "BUDGET", "IN FORCE", "WHY"):
        assert column in head
    assert "608 MiB" in web_1 and "granted" in web_1


def test_one_vm_for_people(frostline: Command) -> None:
    out = frostline("vm", "web-1", width=160).out
    assert out.startswith("web-1  on node-a · enforce · class standard · active")
    assert "443 MiB of host RAM: what is away, less 163 MiB of pool and 2.00 MiB of metadata" in out
    assert "desired 620 MiB (version 41), in force 620 MiB (version 41), lease 22s left" in out
    assert "granted: 620 MiB may be away" in out
    assert "45,120 served, p50 12.3 us, p99 45.7 us; vCPUs waited 560 ms in all" in out
    assert "488 MiB compressed to 150 MiB, 3.3:1" in out
    assert "rwp, freezes by rwp; a scan takes 3.4 ms" in out
    assert "swapped" not in out


def test_ages_by_regions_are_marked_as_an_estimate(frostline: Command, server: RunningServer) -> None:
    assert "estimate" not in frostline("vm", "web-1", width=160).out
    server.servicer.vms[0].state.tracker_grain_pages = 64
    assert "an estimate: one page in 64 speaks for all" in frostline("vm", "web-1", width=160).out


def test_what_looks_cold_of_an_unattached_vm_is_marked_an_estimate_everywhere(
    frostline: Command, server: RunningServer
) -> None:
    out = frostline("vm", "gpu-1", width=200).out
    assert "~300 MiB cold (estimate): not seen touched for 2m, ~250 MiB for 10m, when the kernel looked 14s ago" in out
    assert "the VMM's own memory and that of 3 other processes included" in out
    head, *rows = frostline("vms", width=200).out.splitlines()
    assert "COLD (ESTIMATE)" in head
    assert [row.split()[0] for row in rows if "~300 MiB" in row] == ["gpu-1"]
    document = frostline("vm", "gpu-1", "--json").json
    assert document["cold_estimate"] == {
        "ages": [
            {"min_age_seconds": 120, "cold_bytes": 300 * 2**20},
            {"min_age_seconds": 600, "cold_bytes": 250 * 2**20},
        ],
        "looked_seconds": 14,
        "sharers": 3,
        "caveats": "an estimate for the whole cgroup, the VMM's own memory included, as of when the kernel last looked",
    }
    # Where there is none, there is no word of it.
    del server.servicer.vms[-1]
    assert "ESTIMATE" not in frostline("vms", width=200).out
    assert "estimate" not in frostline("vm", "web-1", width=200).out
    assert frostline("vm", "web-1", "--json").json["cold_estimate"] is None


def test_trouble_is_shown(frostline: Command, server: RunningServer) -> None:
    vm = server.servicer.vms[0]
    vm.state.counters.checksum_errors = 2
    vm.state.counters.takeovers = 3
    vm.state.brake_permille = 250
    vm.state.lease_remaining_seconds = 0
    vm.ack.accepted = False
    vm.ack.reason = common_pb2.REASON_EPOCH
    vm.ack.detail = "epoch 3 is older than 4"
    vm.state.tracker = common_pb2.TRACKER_UNSPECIFIED
    vm.state.counters.tracker_switches = 4
    vm.state.swapped_bytes = 3 * 2**20
    out = frostline("vm", "web-1", width=200).out
    assert "none works now: ages stand still" in out and "others failed 4 times before" in out
    assert "3.00 MiB that the host kernel itself has swapped out" in out and "1.00 MiB untouched" in out
    for expected in ("2 checksum errors", "taken over 3 times", "the brake leaves 25 % of the budget", "lease run out"):
        assert expected in out
    assert "not accepted  epoch: epoch 3 is older than 4" in out
    assert "nack: epoch" in frostline("vms", width=160).out


def test_a_name_cannot_rewrite_the_terminal(frostline: Command, server: RunningServer) -> None:
    evil = "web\x1b]0;owned\x07\x1b[2J\n[red]x\u202e"
    server.servicer.vms[0].identity.name = evil
    for command in (["vms"], ["vm", evil], ["watch", "-n", "1"]):
        out = frostline(*command).out
        assert "\x1b" not in out and "\x07" not in out and "\u202e" not in out
        assert "[red]x" in out or command == ["vms"]  # there, names are cut
    # Scripts get what it really is, escaped as JSON does.
    assert frostline("vms", "--json").json["vms"][0]["name"] == evil


def test_one_vm_for_scripts(frostline: Command) -> None:
    document = frostline("--json", "vm", "web-1").json
    assert document["saved_bytes"] == 443 * 2**20
    assert document["budget"] == {
        "desired_bytes": 620 * 2**20,
        "desired_version": 41,
        "effective_bytes": 620 * 2**20,
        "effective_version": 41,
        "lease_remaining_seconds": 22.4,
    }
    assert (document["tracker"], document["freeze_method"], document["swapped_bytes"]) == ("rwp", "rwp", 0)
    assert document["decision"]["at"] == "2026-11-23T07:39:02.000Z"
    assert len(document["histogram"]) == 16
    assert document["histogram"][0]["max_age_seconds"] == 2
    assert document["histogram"][-1]["max_age_seconds"] is None


def test_explain(frostline: Command) -> None:
    run = frostline("explain", "web-1")
    first, reason, *details = run.out.splitlines()
    assert first.startswith("web-1 may have 620 MiB away")
    assert reason == "reason: granted"
    assert details[0] == "· mode is enforce"
    document = frostline("explain", "web-1", "--json").json
    assert (document["reason"], document["details"][1]) == ("granted", "class is standard")


@pytest.mark.parametrize(
    ("arguments", "request_", "said"),
    [
        (["freeze", "--why", "incident 7"], operator_pb2.FreezeRequest(why="incident 7"), "The fleet is frozen"),
        (["freeze", "--host", "n"], operator_pb2.FreezeRequest(node_id="n"), "Host 'n' is frozen"),
        (["freeze", "--vm", "v"], operator_pb2.FreezeRequest(vm="v"), "frostline unfreeze --vm v"),
        (["unfreeze"], operator_pb2.UnfreezeRequest(), "The fleet is no longer frozen (2 hosts told)"),
        (["unfreeze", "--vm", "v"], operator_pb2.UnfreezeRequest(vm="v"), "VM 'v' is no longer frozen"),
    ],
)
def test_freeze_and_unfreeze(
    frostline: Command, server: RunningServer, arguments: list[str], request_: object, said: str
) -> None:
    run = frostline(*arguments)
    assert run.code == 0 and said in run.out
    assert server.servicer.requests[-1] == request_
    assert frostline(*arguments, "--json").json["hosts_told"] == 2


def test_drain_asks_and_reports(frostline: Command, server: RunningServer) -> None:
    server.servicer.drain_answer = operator_pb2.DrainResponse(command_id="c-9", done=False, evicted_bytes=2**30)
    run = frostline("drain", "web-1")
    assert (run.code, run.out.strip()) == (0, "VM web-1 drains: 1.00 GiB still away.")
    assert server.servicer.requests[-1] == operator_pb2.DrainRequest(vm="web-1", wait=False)


def test_drain_wait_fails_when_it_did_not_get_done(frostline: Command, server: RunningServer) -> None:
    server.servicer.drain_answer = operator_pb2.DrainResponse(command_id="c-9", done=False, evicted_bytes=2**30)
    run = frostline("drain", "web-1", "--wait")
    assert run.code == 8
    assert "1.00 GiB still away" in run.err and "--timeout" in run.err
    server.servicer.drain_answer = operator_pb2.DrainResponse(command_id="c-9", done=True)
    run = frostline("drain", "web-1", "--wait", "--json")
    assert run.json == {"vm": "web-1", "command_id": "c-9", "done": True, "evicted_bytes": 0}
    assert server.servicer.requests[-1].wait


def test_policy_put_sends_the_file_as_it_is(frostline: Command, server: RunningServer, tmp_path: Path) -> None:
    document = tmp_path / "policy.yaml"
    document.write_text("version: 1\n# ünïcode\n")
    run = frostline("policy", "put", str(document), "--expect", "12", "-m", "why not")
    assert run.code == 0 and "in force as policy version 13" in run.out
    assert server.servicer.requests[-1] == operator_pb2.PutPolicyRequest(
        document="version: 1\n# ünïcode\n", expected_version=12, comment="why not"
    )
    assert frostline("policy", "put", "-", "--json", stdin="version: 1\n").json["version"] == 13
    assert server.servicer.requests[-1].document == "version: 1\n"


def test_policy_check_changes_nothing(frostline: Command, server: RunningServer, tmp_path: Path) -> None:
    document = tmp_path / "policy.yaml"
    document.write_text("version: 1\n")
    assert "nothing was changed" in frostline("policy", "check", str(document)).out
    assert server.servicer.requests[-1].dry_run
    assert frostline("policy", "put", str(document), "--dry-run", "--json").json == {"valid": True, "dry_run": True}


def test_an_invalid_policy_names_each_place_and_reason(
    frostline: Command, server: RunningServer, tmp_path: Path
) -> None:
    server.servicer.errors["PutPolicy"] = (
        grpc.StatusCode.INVALID_ARGUMENT,
        "the policy is not valid",
        [("document.classes.standard.floor", "is above the cap"), ("document.vms.x.class", "unknown class 'gold'")],
    )
    document = tmp_path / "policy.yaml"
    document.write_text("version: 1\n")
    run = frostline("policy", "put", str(document))
    assert run.code == 5 and run.out == ""
    assert "  classes.standard.floor: is above the cap" in run.err.splitlines()
    error = frostline("policy", "check", str(document), "--json").error
    assert error["violations"][1] == {"place": "vms.x.class", "reason": "unknown class 'gold'"}


def test_policy_get_prints_the_document_alone(frostline: Command, server: RunningServer) -> None:
    run = frostline("policy", "get")
    assert run.out == server.servicer.policies[0].document
    assert "policy version 12, in force" in run.err and "by anna" in run.err
    document = frostline("policy", "get", "12", "--json").json
    assert document["document"] == server.servicer.policies[0].document
    assert server.servicer.requests[-1] == operator_pb2.GetPolicyRequest(version=12)


def test_policy_list(frostline: Command, server: RunningServer) -> None:
    lines = frostline("policy", "list").out.splitlines()
    assert lines[1].split() == ["12", "yes", "2026-11-23", "07:39:02Z", "anna", "let", "standard", "go"]
    assert [p["version"] for p in frostline("policy", "list", "-n", "1", "--json").json["policies"]] == [12]


def test_watch_lines(frostline: Command) -> None:
    run = frostline("watch", "-n", "2", "-i", "200ms")
    assert run.code == 0
    lines = run.out.splitlines()
    assert len(lines) == 10
    assert "node-a/web-1 enforce active ram=412MiB away=608MiB saved=443MiB" in lines[0]
    assert "away=609MiB" in lines[5]


def test_watch_json_lines(frostline: Command) -> None:
    run = frostline("watch", "web-1", "-n", "2", "-i", "200ms", "--json")
    first, second = [json.loads(line) for line in run.out.splitlines()]
    assert [host["node_id"] for host in first["hosts"]] == ["node-a", "node-b.rack-12.example"]
    assert [vm["name"] for vm in second["vms"]] == ["web-1"]


def test_completion_offers_names_and_never_fails(
    frostline_process: Callable[..., subprocess.Popen[bytes]], server: RunningServer
) -> None:
    def complete(words: str, **environ: str) -> list[str]:
        process = frostline_process(
            **{
                "_FROSTLINE_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split(" ")) - 1),
                **environ,
            }
        )
        out, err = process.communicate(timeout=30)
        assert err == b""
        return out.decode().split()

    def completed(words: str) -> list[str]:
        # A shell is not kept waiting: on a busy machine nothing may be offered.
        return next((offered for _ in range(10) if (offered := complete(words))), [])

    assert completed("frostline vm we") == ["web-1", "web-2"]
    assert completed("frostline vms --host node-a") == ["node-a"]
    assert completed("frostline policy get 1") == ["12", "11"]
    assert "explain" in complete("frostline ex")
    server.servicer.hang.add("ListVms")
    assert complete("frostline vm we") == []
    assert complete("frostline vm we", FROSTLINE_CONTROLLER="unix:/nonexistent/x") == []
    assert complete("frostline vm we", FROSTLINE_CONTROLLER="nonsense") == []
