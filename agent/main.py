# SPDX-License-Identifier: Apache-2.0
"""The entry point of frostline-agent."""

from __future__ import annotations


def main() -> None:
    """Run the command line."""
    # Daemon and tools share one program; what only one of them needs is imported by its command.
    from frostline.agent.cli.commands import app

    app(prog_name="frostline-agent")


if __name__ == "__main__":
    main()
