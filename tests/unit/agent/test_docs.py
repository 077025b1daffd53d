# SPDX-License-Identifier: Apache-2.0
"""The tables in docs/ say what the code does: settings, limits, exit codes, metrics."""

from __future__ import annotations

import re
from pathlib import Path

from frostline.agent.cli.exits import EPILOG, MEANINGS
from frostline.agent.limits import LimitsDocument
from frostline.agent.metrics import AGENT_METRICS, LATENCY_METRIC, VM_METRICS
from frostline.agent.settings import AgentSettings
from tests.unit.agent.doubles import a_status

DOCS = Path(__file__).resolve().parents[3] / "docs"


def section(path: str, title: str) -> str:
    text = (DOCS / path).read_text(encoding="utf-8")
    match = re.search(rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match is not None, f"{path} has no section {title}"
    return match.group(1)


def rows(text: str) -> list[list[str]]:
    """Cells of table rows, without heads and rules."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    rules = {index for index, row in enumerate(cells) if set(row[0].strip("| ")) <= {"-"} or row[0].startswith("---")}
    return [row for index, row in enumerate(cells) if index not in rules and index + 1 not in rules]


def names(text: str) -> list[str]:
    return [row[0].strip("`") for row in rows(text)]


def test_every_setting_is_in_the_table_and_nothing_else() -> None:
    assert sorted(names(section("agent.md", "Settings"))) == sorted(AgentSettings.model_fields)


def test_every_key_of_the_limits_file_is_in_the_table() -> None:
    assert names(section("agent.md", "The limits file")) == list(LimitsDocument.model_fields)


def test_exit_codes_are_in_the_table_and_in_the_help() -> None:
    table = {int(code): meaning for code, meaning in rows(section("agent.md", "Commands")) if code.isdecimal()}
    assert table == {int(code): meaning for code, meaning in MEANINGS.items()}
    assert all(f"{code} {meaning}" in EPILOG for code, meaning in table.items())


def test_every_metric_is_in_the_table_with_kind_unit_and_meaning() -> None:
    found = rows(section("metrics.md", "Agent"))
    table = {row[0].strip("`"): (row[1], row[2].strip("`"), row[4]) for row in found}
    attributes = {row[0].strip("`"): re.findall(r"`(\w+)`", row[3]) for row in found}
    assert all(
        attributes[metric.name] == list(metric.attributes(a_status()) if metric.attributes else ())
        for metric in VM_METRICS
    )
    expected = {
        metric.name: ("counter" if metric.counter else "gauge", metric.unit, metric.description)
        for metric in VM_METRICS
    }
    expected |= {name: ("counter" if counter else "gauge", unit, text) for name, unit, text, counter in AGENT_METRICS}
    name, unit, text = LATENCY_METRIC
    expected[name] = ("counter", unit, text)
    assert table == expected
