# SPDX-License-Identifier: Apache-2.0
"""Completes names from the controller. A shell's Tab must never wait or print an error: no answer, no names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final

import typer

LIMIT_SECONDS: Final = 0.7
_MAX_NAMES: Final = 500


def vm_names(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from frostline.controller.cli.client import OperatorClient

    async def ask(client: OperatorClient) -> list[tuple[str, str]]:
        answer = await client.list_vms()
        names = [vm.identity.name for vm in answer.vms]
        # A name that two VMs share cannot be used to name one: offer the id instead.
        return [
            (vm.identity.name if names.count(vm.identity.name) == 1 else vm.identity.vm_id, f"on {vm.node_id}")
            for vm in answer.vms[:_MAX_NAMES]
        ]

    return _matching(_ask(ctx, ask), incomplete)


def host_names(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from frostline.controller.cli.client import OperatorClient

    async def ask(client: OperatorClient) -> list[tuple[str, str]]:
        answer = await client.list_hosts()
        return [(host.node_id, f"{host.vm_count} VMs") for host in answer.hosts[:_MAX_NAMES]]

    return _matching(_ask(ctx, ask), incomplete)


def policy_versions(ctx: typer.Context, incomplete: str) -> list[tuple[str, str]]:
    from frostline.controller.cli.client import OperatorClient

    async def ask(client: OperatorClient) -> list[tuple[str, str]]:
        answer = await client.list_policies(50)
        return [(str(policy.version), policy.comment or policy.author) for policy in answer.policies]

    return _matching(_ask(ctx, ask), incomplete)


def _ask(ctx: typer.Context, work: Callable[..., Awaitable[list[tuple[str, str]]]]) -> list[tuple[str, str]]:
    from frostline.controller.cli.errors import CliError
    from frostline.controller.cli.options import Shared, make_cli

    given = {**ctx.find_root().params, **{key: value for key, value in ctx.params.items() if value}}
    try:
        cli = make_cli(Shared(controller=given.get("controller"), insecure=bool(given.get("insecure"))))

        async def bounded() -> list[tuple[str, str]]:
            async with asyncio.timeout(LIMIT_SECONDS), cli.client() as client:
                return await work(client)

        return asyncio.run(bounded())
    except (CliError, TimeoutError, OSError):
        return []


def _matching(found: list[tuple[str, str]], incomplete: str) -> list[tuple[str, str]]:
    from frostline.controller.cli.words import clean

    # A name with characters that clean() changes would not be found again: leave it out.
    return [(name, clean(help_)) for name, help_ in found if name.startswith(incomplete) and clean(name) == name]
