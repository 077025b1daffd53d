# SPDX-License-Identifier: Apache-2.0
"""`frostline policy`: put, check, get and list policy documents."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.text import Text

from frostline.controller.cli.completion import policy_versions
from frostline.controller.cli.document import policy_document
from frostline.controller.cli.errors import CliError
from frostline.controller.cli.exits import Exit
from frostline.controller.cli.options import Cli, command
from frostline.controller.cli.tables import policies_table, when
from frostline.controller.cli.words import clean

MAX_DOCUMENT_BYTES: Final = 2**20

app = typer.Typer(help="Put, check, get and list policy documents.", no_args_is_help=True)

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON; - reads standard input.")]


@command(app, "put")
def put(
    cli: Cli,
    file: FileArgument,
    expected: Annotated[
        int,
        typer.Option(
            "--expect",
            metavar="VERSION",
            min=0,
            help="Only if this version is still in force (else exit code 6). 0: whatever is.",
        ),
    ] = 0,
    comment: Annotated[str, typer.Option("--comment", "-m", metavar="TEXT", help="Why, for those who list it.")] = "",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only check it, as `policy check` does.")] = False,
) -> None:
    """Put a policy document in force. An invalid one is refused whole, with each place and reason."""
    document, source = _read(file)
    answer = cli.call(
        lambda client: client.put_policy(document, source, expected_version=expected, comment=comment, dry_run=dry_run)
    )
    if dry_run:
        _valid(cli, source)
        return
    cli.answer(
        {"version": answer.version, "in_force": True, "dry_run": False},
        Text(f"{source} is in force as policy version {answer.version}."),
    )


@command(app, "check")
def check(cli: Cli, file: FileArgument) -> None:
    """Have the controller check a policy document, changing nothing."""
    document, source = _read(file)
    cli.call(lambda client: client.put_policy(document, source, expected_version=0, comment="", dry_run=True))
    _valid(cli, source)


@command(app, "get")
def get(
    cli: Cli,
    version: Annotated[
        int,
        typer.Argument(
            metavar="[VERSION]",
            min=0,
            help="Default: the one in force.",
            autocompletion=policy_versions,
            show_default=False,
        ),
    ] = 0,
) -> None:
    """Print a policy document as it was put (to stdout; what it is goes to stderr)."""
    policy = cli.call(lambda client: client.get_policy(version))
    if cli.json:
        cli.print_json(policy_document(policy, with_text=True))
        return
    state = "in force" if policy.in_force else "not in force"
    comment = f": {clean(policy.comment)}" if policy.comment else ""
    cli.note(
        f"policy version {policy.version}, {state}, put {when(policy.created_at_unix_ns)}"
        f" by {clean(policy.author) or 'unknown'}{comment}"
    )
    stream = cli.screen.out.file
    stream.write(policy.document if policy.document.endswith("\n") else policy.document + "\n")
    stream.flush()


@command(app, "list")
def list_(
    cli: Cli,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, max=200, help="How many, newest first.")] = 20,
) -> None:
    """List policy versions, newest first."""
    answer = cli.call(lambda client: client.list_policies(limit))
    cli.answer(
        {"policies": [policy_document(policy, with_text=False) for policy in answer.policies]},
        policies_table(answer.policies, cli.screen)
        if answer.policies
        else Text("no policy has been put yet; the built-in defaults hold"),
    )


def _valid(cli: Cli, source: str) -> None:
    cli.answer({"valid": True, "dry_run": True}, Text(f"{source} is a valid policy; nothing was changed."))


def _read(file: str) -> tuple[str, str]:
    source = "standard input" if file == "-" else clean(file)
    tried = f"read the policy in {source}"
    try:
        if file == "-":
            data = sys.stdin.buffer.read(MAX_DOCUMENT_BYTES + 1)
        else:
            with Path(file).open("rb") as stream:
                data = stream.read(MAX_DOCUMENT_BYTES + 1)
    except OSError as error:
        raise CliError(Exit.USAGE, tried, said=error.strerror or str(error)) from None
    if len(data) > MAX_DOCUMENT_BYTES:
        raise CliError(Exit.REFUSED, tried, said=f"it is larger than {MAX_DOCUMENT_BYTES // 1024} KiB")
    try:
        return data.decode(), source
    except UnicodeDecodeError as error:
        raise CliError(Exit.REFUSED, tried, said=f"byte {error.start} is not UTF-8; save it as UTF-8 text") from None
