# SPDX-License-Identifier: Apache-2.0
"""Calls to the controller, with a limit on each and errors in the operator's words."""

from __future__ import annotations

import getpass
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Final, TypeVar

import grpc
import grpc.aio

from frostline.controller.cli.errors import STORE_TODO, CliError, from_rpc
from frostline.controller.cli.exits import Exit
from frostline.v1 import operator_pb2, operator_pb2_grpc
from frostline.wire.channels import Address, make_channel

Request = TypeVar("Request")
Answer = TypeVar("Answer")

_LISTED: Final = "`frostline vms` and `frostline hosts` list what there is"
# How long the second look may take that tells a controller without a store from no controller.
_SECOND_LOOK_SECONDS: Final = 2.0
# The server answers a waiting drain shortly before the deadline; leave it that.
_DEADLINE_MARGIN_SECONDS: Final = 2.0


class OperatorClient:
    """`async with OperatorClient(address, timeout_seconds) as client:`; every method raises CliError."""

    def __init__(self, address: Address, timeout_seconds: float, *, insecure_off_loopback: bool = False) -> None:
        self.address = address
        self.timeout_seconds = timeout_seconds
        self._insecure = insecure_off_loopback

    async def __aenter__(self) -> OperatorClient:
        self._channel = make_channel(self.address, insecure_off_loopback=self._insecure)
        self._stub: operator_pb2_grpc.OperatorServiceAsyncStub = operator_pb2_grpc.OperatorServiceStub(self._channel)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await self._channel.close()

    async def list_hosts(self) -> operator_pb2.ListHostsResponse:
        return await self._call("list hosts", self._stub.ListHosts, operator_pb2.ListHostsRequest())

    async def list_vms(self, node_id: str = "") -> operator_pb2.ListVmsResponse:
        tried = f"list the VMs of host {node_id!r}" if node_id else "list VMs"
        return await self._call(tried, self._stub.ListVms, operator_pb2.ListVmsRequest(node_id=node_id))

    async def get_vm(self, vm: str) -> operator_pb2.Vm:
        answer = await self._call(f"show VM {vm!r}", self._stub.GetVm, operator_pb2.GetVmRequest(vm=vm))
        return answer.vm

    async def explain(self, vm: str) -> operator_pb2.ExplainResponse:
        return await self._call(f"explain VM {vm!r}", self._stub.Explain, operator_pb2.ExplainRequest(vm=vm))

    async def put_policy(
        self, document: str, source: str, *, expected_version: int, comment: str, dry_run: bool
    ) -> operator_pb2.PutPolicyResponse:
        return await self._call(
            f"{'check' if dry_run else 'put'} the policy in {source}",
            self._stub.PutPolicy,
            operator_pb2.PutPolicyRequest(
                document=document, expected_version=expected_version, comment=comment, dry_run=dry_run
            ),
        )

    async def get_policy(self, version: int) -> operator_pb2.Policy:
        tried = f"get policy version {version}" if version else "get the policy in force"
        answer = await self._call(
            tried,
            self._stub.GetPolicy,
            operator_pb2.GetPolicyRequest(version=version),
            missing="`frostline policy list` lists the versions that are kept",
        )
        return answer.policy

    async def list_policies(self, limit: int) -> operator_pb2.ListPoliciesResponse:
        return await self._call("list policies", self._stub.ListPolicies, operator_pb2.ListPoliciesRequest(limit=limit))

    async def freeze(self, node_id: str, vm: str, why: str) -> operator_pb2.FreezeResponse:
        return await self._call(
            f"freeze {scope(node_id, vm)}",
            self._stub.Freeze,
            operator_pb2.FreezeRequest(node_id=node_id, vm=vm, why=why),
        )

    async def unfreeze(self, node_id: str, vm: str) -> operator_pb2.UnfreezeResponse:
        return await self._call(
            f"unfreeze {scope(node_id, vm)}",
            self._stub.Unfreeze,
            operator_pb2.UnfreezeRequest(node_id=node_id, vm=vm),
            missing="`frostline hosts` and `frostline explain VM` show what is frozen",
        )

    async def drain(self, vm: str, *, wait_seconds: float | None) -> operator_pb2.DrainResponse:
        """Ask for everything back. With `wait_seconds` the answer comes when all is back or that time is up."""
        waits = wait_seconds is not None
        limit = wait_seconds + _DEADLINE_MARGIN_SECONDS if wait_seconds is not None else None
        return await self._call(
            f"drain VM {vm!r}", self._stub.Drain, operator_pb2.DrainRequest(vm=vm, wait=waits), limit_seconds=limit
        )

    async def watch(self, vm: str, interval_seconds: float) -> AsyncIterator[operator_pb2.WatchResponse]:
        """Messages as they come, without an end. The first must come within the timeout."""
        tried = f"watch VM {vm!r}" if vm else "watch the fleet"
        call = self._stub.Watch(operator_pb2.WatchRequest(interval_seconds=interval_seconds, vm=vm))
        try:
            async for message in call:
                yield message
        except grpc.aio.AioRpcError as error:
            raise await self._explained(error, tried, reads=True) from error
        finally:
            call.cancel()

    async def _call(
        self,
        tried: str,
        method: Callable[..., Awaitable[Answer]],
        request: object,
        *,
        limit_seconds: float | None = None,
        missing: str = _LISTED,
    ) -> Answer:
        """One call; `missing` is what to do when what it names is not there."""
        try:
            return await method(request, timeout=limit_seconds or self.timeout_seconds, metadata=_said_to_be())
        except grpc.aio.AioRpcError as error:
            raise await self._explained(error, tried, missing=missing) from error

    async def _explained(
        self, error: grpc.aio.AioRpcError, tried: str, *, reads: bool = False, missing: str = _LISTED
    ) -> CliError:
        explained = from_rpc(error, tried, str(self.address), not_found_todo=missing)
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            return explained
        # UNAVAILABLE is both "no controller" and "no store": a controller that still answers tells them apart. Reads
        # go on without a store, so theirs was the connection unless the controller itself says that the store is away.
        try:
            hosts = await self._stub.ListHosts(operator_pb2.ListHostsRequest(), timeout=_SECOND_LOOK_SECONDS)
        except grpc.aio.AioRpcError:
            return explained
        if reads and hosts.store_available:
            return explained
        return CliError(Exit.STORE_UNAVAILABLE, tried, on=explained.on, said=explained.said, todo=STORE_TODO)


def _said_to_be() -> tuple[tuple[str, str], ...]:
    """Who asks, for the audit log. A claim, as good as the login that it comes from."""
    try:
        user = os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in a container say
        user = f"uid {os.getuid()}"
    # Metadata takes printable ASCII only.
    return (("frostline-user", "".join(char if " " <= char <= "~" else "?" for char in user)[:64]),)


def scope(node_id: str, vm: str) -> str:
    return f"VM {vm!r}" if vm else f"host {node_id!r}" if node_id else "the fleet"
