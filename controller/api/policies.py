# SPDX-License-Identifier: Apache-2.0
"""Policy documents: put, get and list."""

from __future__ import annotations

import asyncio

import grpc
import structlog

from frostline.controller.api.author import author_of, checked_text
from frostline.controller.api.status import Context, StatusError, bad_request, not_found
from frostline.controller.fleet.fleet import Fleet
from frostline.controller.policy.document import load
from frostline.controller.policy.loader import DocumentError
from frostline.controller.state.keeper import Keeper
from frostline.controller.state.store import Store
from frostline.v1 import operator_pb2 as op

_log = structlog.get_logger(__name__)

DEFAULT_LIMIT = 20
MAX_LIMIT = 200
# Redis counts in doubles inside of scripts.
MAX_VERSION = 1 << 53


class Policies:
    def __init__(self, fleet: Fleet, store: Store, keeper: Keeper) -> None:
        self._fleet = fleet
        self._store = store
        self._keeper = keeper
        self._checking = asyncio.Semaphore(2)

    async def put(self, request: op.PutPolicyRequest, context: Context) -> op.PutPolicyResponse:
        comment, author = checked_text("comment", request.comment), author_of(context)
        try:
            async with self._checking:
                # A large document takes tens of milliseconds, in which no session should have to wait.
                policy = await asyncio.to_thread(load, request.document)
        except DocumentError as error:
            text = f"the policy was rejected whole, version {self._fleet.policy.version} stays in force: {error}"
            _log.warning("policy rejected", author=author, problems=len(error.problems), why=str(error))
            fields = [(f"document.{path}" if path else "document", reason) for path, reason in error.problems]
            raise bad_request(text, fields) from None
        if request.expected_version > MAX_VERSION:
            raise bad_request("no such version", [("expected_version", f"{request.expected_version} cannot be")])
        if request.dry_run:
            self._compare(request.expected_version, self._fleet.policy.version)
            return op.PutPolicyResponse(version=self._fleet.policy.version)
        done, version = await self._keeper.put_policy(policy, request.expected_version, author, comment)
        if not done:
            self._compare(request.expected_version, version)
        return op.PutPolicyResponse(version=version)

    @staticmethod
    def _compare(expected: int, in_force: int) -> None:
        if expected not in (0, in_force):
            text = f"version {in_force} is in force, not {expected}; look at it, then put yours if it still holds"
            raise StatusError(grpc.StatusCode.ABORTED, text)

    async def get(self, request: op.GetPolicyRequest) -> op.GetPolicyResponse:
        in_force = self._fleet.policy
        if request.version in (0, in_force.version):
            message = _message(in_force.version, self._keeper.in_force(), in_force=True)
            message.document = in_force.text
            return op.GetPolicyResponse(policy=message)
        stored = await self._store.get_policy(request.version) if request.version <= MAX_VERSION else {}
        if not stored:
            raise not_found(f"no policy version {request.version}; 'frostline policy list' lists those kept")
        message = _message(request.version, stored, in_force=False)
        message.document = stored.get("document", "")
        return op.GetPolicyResponse(policy=message)

    async def list(self, request: op.ListPoliciesRequest) -> op.ListPoliciesResponse:
        limit = request.limit or DEFAULT_LIMIT
        if limit > MAX_LIMIT:
            raise bad_request("too many policies asked for", [("limit", f"{limit} is more than {MAX_LIMIT}")])
        in_force = self._fleet.policy.version
        own = _message(in_force, self._keeper.in_force(), in_force=True)
        if not self._store.reads or in_force == 0:
            return op.ListPoliciesResponse(policies=[own])
        versions = list(range(in_force, max(in_force - limit, 0), -1))
        rows = await self._store.list_policies(versions)
        return op.ListPoliciesResponse(
            policies=[_message(version, fields, in_force=version == in_force) for version, fields in rows] or [own]
        )


def _message(version: int, fields: dict[str, str], *, in_force: bool) -> op.Policy:
    created = fields.get("created_at_unix_ns", "")
    return op.Policy(
        version=version,
        author=fields.get("author", "frostline"),
        comment=fields.get("comment", "built in"),
        created_at_unix_ns=int(created) if created.isascii() and created.isdigit() and len(created) < 20 else 0,
        in_force=in_force,
    )
