# SPDX-License-Identifier: Apache-2.0
"""docs/cli.md and --json name the same keys: scripts are written against that page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from frostline.v1 import common_pb2, operator_pb2
from tests.unit.cli.conftest import Command
from tests.unit.cli.servicer import RunningServer

DOCS = (Path(__file__).parents[3] / "docs" / "cli.md").read_text()
JSON_PART = DOCS[DOCS.index("\n## JSON\n") :]


def _keys(document: Any) -> set[str]:
    if isinstance(document, dict):
        return set(document) | {key for value in document.values() for key in _keys(value)}
    if isinstance(document, list):
        return {key for value in document for key in _keys(value)}
    return set()


def test_every_key_is_documented_and_every_documented_key_exists(
    frostline: Command, server: RunningServer, tmp_path: Path
) -> None:
    policy = tmp_path / "policy.yaml"
    policy.write_text("version: 1\n")
    commands = [
        ["hosts"], ["vms"], ["vm", "web-1"], ["explain", "web-1"], ["freeze"], ["unfreeze"], ["drain", "web-1"],
        ["policy", "put", str(policy)], ["policy", "check", str(policy)], ["policy", "get"], ["policy", "list"],
        ["watch", "-n", "1"],
    ]  # fmt: skip
    produced = {key for command in commands for key in _keys(frostline(*command, "--json").json)}
    documented = set(re.findall(r"`([a-z][a-z0-9_]*)`", JSON_PART))
    words = {
        enum.values[i].name.removeprefix(prefix).lower()
        for enum, prefix in (
            (common_pb2.PagerState.DESCRIPTOR, "PAGER_STATE_"),
            (common_pb2.Reason.DESCRIPTOR, "REASON_"),
            (common_pb2.Tracker.DESCRIPTOR, "TRACKER_"),
            (common_pb2.FreezeMethod.DESCRIPTOR, "FREEZE_METHOD_"),
            (operator_pb2.HostState.DESCRIPTOR, "HOST_STATE_"),
        )
        for i in range(len(enum.values))
    }
    commands_named = {"explain", "freeze", "unfreeze", "drain", "watch", "null"}
    assert produced - documented == set()
    assert documented - produced - words - commands_named == set()
