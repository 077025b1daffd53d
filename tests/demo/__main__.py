# SPDX-License-Identifier: Apache-2.0
"""python -m tests.demo: exit status 0 if everything held, 1 if not, 2 if it cannot run here, 130 after ^C."""

from __future__ import annotations

import argparse
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Final

from rich.console import Console
from rich.text import Text

from tests.conftest import why_no_guest
from tests.demo.screen import Screen
from tests.demo.story import BUSY, QUIET, Story
from tests.system.guest import GuestError
from tests.system.world import MIB, WorldError

REPOSITORY: Final = Path(__file__).resolve().parents[2]
LEAST_AVAILABLE_MIB: Final = 2048
PIPE_WIDTH: Final = 110


def _why_not() -> str | None:
    reason = why_no_guest()
    if reason is not None:
        return reason
    if shutil.which("redis-server") is None:
        return "redis-server is not there: install redis-server"
    available = next(
        int(line.split()[1]) // 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    if available < LEAST_AVAILABLE_MIB:
        return f"{available} MiB of memory are available; two guests and their pages need {LEAST_AVAILABLE_MIB} MiB"
    return None


def _interrupted(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description="The whole loop on two real guests.")
    parser.add_argument("--report", type=Path, default=REPOSITORY / "demo-report.json", help="where the JSON goes")
    parser.add_argument("--logs", type=Path, default=REPOSITORY / "build" / "demo", help="folder for all logs")
    options = parser.parse_args()
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPE_WIDTH)
    reason = _why_not()
    if reason is not None:
        console.print(f"the demo cannot run here: {reason}", style="red", soft_wrap=True)
        return 2
    signal.signal(signal.SIGTERM, _interrupted)
    shutil.rmtree(options.logs, ignore_errors=True)
    options.logs.mkdir(parents=True)
    options.report.unlink(missing_ok=True)
    failure = ""
    with Screen(console, (BUSY.name, QUIET.name), (BUSY.memory_mib * MIB, QUIET.memory_mib * MIB)) as screen:
        story = Story(screen, options.logs)
        try:
            story.tell()
        except KeyboardInterrupt:
            screen.say("Interrupted: everything has been ended.")
            return 130
        except (WorldError, GuestError, TimeoutError, subprocess.SubprocessError, OSError) as error:
            failure = f"{type(error).__name__}: {error}"
        story.report.seconds = screen.seconds
    story.report.write(options.report)
    console.print()
    story.report.show(console)
    console.print(Text(f"report {options.report}, logs {options.logs}", style="dim"), soft_wrap=True)
    if failure:
        console.print(Text(f"the demo stopped here: {failure}", style="red"), soft_wrap=True)
    return 0 if story.report.success and not failure else 1


if __name__ == "__main__":
    sys.exit(main())
