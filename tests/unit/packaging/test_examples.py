# SPDX-License-Identifier: Apache-2.0
"""What the documentation shows to be copied is accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from frostline.agent.limits import parse_limits
from frostline.controller.policy.document import load

ROOT = Path(__file__).resolve().parents[3]


def blocks(page: str) -> list[str]:
    """The YAML examples of a page."""
    return re.findall(r"```yaml\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "controller/policy/README.md"])
def test_policies(page: str) -> None:
    assert blocks(page)
    for example in blocks(page):
        assert load(example).text == example


def test_limits_files() -> None:
    (example,) = blocks("docs/agent.md")
    assert parse_limits(example, "docs/agent.md").document.allow_evict
    (printed,) = re.findall(r"printf '(.*)' > /etc/frostline/limits.yaml", (ROOT / "README.md").read_text())
    assert parse_limits(printed.replace("\\n", "\n"), "README.md").document.allow_evict
