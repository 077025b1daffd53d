# SPDX-License-Identifier: Apache-2.0
"""OperatorService: reading the picture. Changing it is in changes.py, following it in watch.py."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc
import grpc.aio
import structlog

from frostline.controller.api.changes import Changes
from frostline.controller.api.explain import explain
from frostline.controller.api.policies import Policies
from frostline.controller.api.status import Context, StatusError, abort, not_found
from frostline.controller.api.view import host_message, vm_message
from frostline.controller.api.watch import Watchers
from frostline.controller.fleet.fleet import AmbiguousError, Fleet, NotFoundError
from frostline.controller.policy.loader import DocumentError
from frostline.controller.session.hub import Hub
from frostline.controller.state.keeper import Keeper
from frostline.controller.state.store import Failure, Store, StoreError
from frostline.v1 import operator_pb2 as op
from frostline.v1 import operator_pb2_grpc as rpc

_log = structlog.get_logger(__name__)
_Request = TypeVar("_Request")
_Response = TypeVar("_Response")


def translate(error: Exception) -> StatusError | None:
    """What an exception of ours means to a caller; None for one that is a bug."""
    if isinstance(error, StatusError):
        return error
    if isinstance(error, NotFoundError):
        return not_found(str(error))
    if isinstance(error, AmbiguousError):
        return StatusError(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    if isinstance(error, StoreError):
        code = grpc.StatusCode.RESOURCE_EXHAUSTED if error.failure is Failure.FULL else grpc.StatusCode.UNAVAILABLE
        return StatusError(code, f"not done: {error}")
    if isinstance(error, OverflowError):
        return StatusError(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    return None


def _answers(
    method: Callable[[Any, _Request, Context], Awaitable[_Response]],
) -> Callable[[Any, _Request, Context], Awaitable[_Response]]:
    """Errors of ours become gRPC errors with words; others are logged with their traceback and say nothing."""

    @functools.wraps(method)
    async def wrapped(self: Any, request: _Request, context: Context) -> _Response:
        try:
            return await method(self, request, context)
        except (StatusError, NotFoundError, AmbiguousError, StoreError, DocumentError, OverflowError) as error:
            status = translate(error)
            if status is None:
                raise
            await abort(context, status)

    return wrapped


class OperatorService(rpc.OperatorServiceServicer):
    def __init__(self, fleet: Fleet, hub: Hub, store: Store, keeper: Keeper) -> None:
        self._fleet = fleet
        self._hub = hub
        self._store = store
        self._policies = Policies(fleet, store, keeper)
        self._changes = Changes(fleet, hub, store, keeper)
        self.watchers = Watchers(fleet)

    @_answers
    async def ListHosts(self, request: op.ListHostsRequest, context: Context) -> op.ListHostsResponse:  # noqa: N802
        hosts = sorted(self._fleet.hosts.values(), key=lambda host: host.node_id)
        return op.ListHostsResponse(
            hosts=[host_message(self._fleet, host) for host in hosts],
            store_available=self._store.available,
            policy_version=self._fleet.policy.version,
            fleet_frozen=self._fleet.freezes.fleet is not None,
            store_problem="" if self._store.available else self._store.problem,
        )

    @_answers
    async def ListVms(self, request: op.ListVmsRequest, context: Context) -> op.ListVmsResponse:  # noqa: N802
        if request.node_id:
            host = self._fleet.find_host(request.node_id)
            pairs = [(host, vm) for vm in host.vms.values()]
        else:
            pairs = list(self._fleet.vms())
        pairs.sort(key=lambda pair: (pair[0].node_id, pair[1].identity.name, pair[1].identity.vm_id))
        return op.ListVmsResponse(vms=[vm_message(host, vm, histogram=False) for host, vm in pairs])

    @_answers
    async def GetVm(self, request: op.GetVmRequest, context: Context) -> op.GetVmResponse:  # noqa: N802
        host, vm = self._fleet.find_vm(request.vm)
        return op.GetVmResponse(vm=vm_message(host, vm, histogram=True))

    @_answers
    async def Explain(self, request: op.ExplainRequest, context: Context) -> op.ExplainResponse:  # noqa: N802
        host, vm = self._fleet.find_vm(request.vm)
        problem = "" if self._store.available else self._store.problem
        return explain(self._fleet, host, vm, store_problem=problem, epoch=self._hub.epoch)

    async def Watch(  # noqa: N802
        self, request: op.WatchRequest, context: Context
    ) -> AsyncIterator[op.WatchResponse]:
        try:
            async for response in self.watchers.watch(request):
                yield response
        except (StatusError, NotFoundError, AmbiguousError) as error:
            status = translate(error)
            if status is None:
                raise
            await abort(context, status)

    @_answers
    async def PutPolicy(self, request: op.PutPolicyRequest, context: Context) -> op.PutPolicyResponse:  # noqa: N802
        return await self._policies.put(request, context)

    @_answers
    async def GetPolicy(self, request: op.GetPolicyRequest, context: Context) -> op.GetPolicyResponse:  # noqa: N802
        return await self._policies.get(request)

    @_answers
    async def ListPolicies(  # noqa: N802
        self, request: op.ListPoliciesRequest, context: Context
    ) -> op.ListPoliciesResponse:
        return await self._policies.list(request)

    @_answers
    async def Freeze(self, request: op.FreezeRequest, context: Context) -> op.FreezeResponse:  # noqa: N802
        return await self._changes.freeze(request, context)

    @_answers
    async def Unfreeze(self, request: op.UnfreezeRequest, context: Context) -> op.UnfreezeResponse:  # noqa: N802
        return await self._changes.unfreeze(request, context)

    @_answers
    async def Drain(self, request: op.DrainRequest, context: Context) -> op.DrainResponse:  # noqa: N802
        return await self._changes.drain(request, context)
