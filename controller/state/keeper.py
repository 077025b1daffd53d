# SPDX-License-Identifier: Apache-2.0
"""Keeps memory and Redis in step: epoch, policy in force, freezes, and what to do when Redis lost them."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import structlog

from frostline.controller.fleet.fleet import Fleet
from frostline.controller.policy.document import DEFAULT_DOCUMENT, Policy, load
from frostline.controller.policy.loader import DocumentError
from frostline.controller.session.hub import Hub
from frostline.controller.state import scripts
from frostline.controller.state.store import Failure, Store, StoreError
from frostline.controller.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)

TICK_SECONDS = 1.0
# How often a new policy is tried on a Redis that loses its data meanwhile.
PUT_TRIES = 3
# How many stored versions are tried when the newest cannot be read any more.
MAX_FALLBACKS = 50


class Keeper:
    """`tick` is the whole of it: safe to run at any time, and after any failure."""

    def __init__(self, store: Store, fleet: Fleet, metrics: Metrics) -> None:
        self._store = store
        self._fleet = fleet
        self._metrics = metrics
        self._hub: Hub | None = None
        self._marker = ""
        self._above = 0  # an agent has seen this epoch, ours has to be higher
        self._fields: dict[str, str] = {}  # of the policy in force, as stored
        self._bad_version = 0  # stored, but not usable; said once
        self._registry_at = float("-inf")
        self._lock = asyncio.Lock()

    def attach(self, hub: Hub) -> None:
        self._hub = hub

    @property
    def hub(self) -> Hub:
        if self._hub is None:
            raise RuntimeError("the keeper is used before it was attached to a hub")
        return self._hub

    async def run(self) -> None:
        """Tick for ever; failures were told by the store and are tried again."""
        while True:
            try:
                await self.tick()
            except StoreError:
                pass
            except Exception:
                _log.exception("keeping step with Redis failed; trying again")
            await asyncio.sleep(TICK_SECONDS)

    async def raise_epoch(self, above: int, node_id: str) -> None:
        """An agent has seen a higher epoch than ours: Redis lost it. Get a higher one, now or when Redis is back."""
        if above > self._above:
            _log.warning("an agent has seen a higher epoch", node_id=node_id, theirs=above, ours=self.hub.epoch)
            self._above = above
        try:
            await self.tick()
        except StoreError as error:
            _log.warning("no higher epoch for now; its host gets no budgets", node_id=node_id, why=str(error))

    async def tick(self) -> None:
        """Compare with Redis and put right whichever side is behind."""
        async with self._lock:
            await self._reconcile()
            await self._register()

    async def _reconcile(self) -> None:
        hub, known_marker = self.hub, self._marker
        marker, fresh, epoch, stored_version, freezes = await self._store.reconcile(
            hub.controller_id, hub.epoch, self._above
        )
        lost = known_marker != "" and (fresh or marker != known_marker)
        self._marker = marker
        await self._keep_freezes(freezes, lost)
        await self._keep_policy(stored_version, lost)
        if epoch != hub.epoch:
            # Last: with an epoch budgets are sent, and those of the built-in policy would call everything back.
            _log.info("epoch", epoch=epoch, before=hub.epoch)
            hub.epoch = epoch
            self._fleet.wake_all()
        if lost:
            self._metrics.count("store.losses")
            _log.error(
                "Redis had lost its data; policy, freezes and epoch were put back from memory",
                policy_version=self._fleet.policy.version,
                epoch=epoch,
                lost="earlier policy versions, decisions and audit log",
            )

    async def put_policy(self, policy: Policy, expected: int, author: str, comment: str) -> tuple[bool, int]:
        """
        Compare-and-set in Redis; in force here at once when it went through.

        A Redis that has lost its data gets them back first: on an empty one the new policy would have number 1.
        """
        async with self._lock:
            at_ns, in_force = time.time_ns(), self._fleet.policy.version
            for _ in range(PUT_TRIES):
                put = await self._store.put_policy(in_force, expected, policy.text, author, comment, at_ns)
                if put is not None:
                    break
                await self._reconcile()
            else:
                text = "Redis loses its data again and again; the policy was not put: look at its log and its disk"
                raise StoreError(Failure.OTHER, text)
            done, version = put
            if done:
                self._fields = {"author": author, "comment": comment, "created_at_unix_ns": str(at_ns)}
                self._adopt(Policy(policy.document, policy.text, version))
            return done, version

    def in_force(self) -> dict[str, str]:
        """Author, comment and time of the policy in force."""
        return self._fields

    async def _keep_policy(self, stored_version: int, lost: bool) -> None:
        ours = self._fleet.policy.version
        if stored_version > ours:
            await self._load_policy(stored_version)
        elif ours > stored_version:
            fields = {**self._fields, "document": self._fleet.policy.text}
            await self._store.put_back_policy(ours, fields)
            if not lost:
                _log.warning("Redis had an older policy; the one in force was put back", version=ours)
        elif ours == 0:
            await self._seed()
        elif lost:
            # Same number, but maybe not the same document: another data set answers.
            stored = await self._store.get_policy(ours)
            if stored.get("document") != self._fleet.policy.text:
                _log.warning("Redis has another policy under the number in force; it is taken over", version=ours)
                await self._load_policy(ours)

    async def _seed(self) -> None:
        """A new install: the built-in policy becomes version 1, so that there is something to compare with."""
        fields = {"author": "frostline", "comment": "built in", "created_at_unix_ns": str(time.time_ns())}
        version = await self._store.put_back_policy(1, {**fields, "document": DEFAULT_DOCUMENT})
        if version == 1:
            self._fields = fields
            self._adopt(Policy(self._fleet.policy.document, DEFAULT_DOCUMENT, 1))

    async def _load_policy(self, version: int) -> None:
        """Take over a stored policy. One that is not valid is passed over: the last good one stays, or an older one."""
        oldest = max(version - MAX_FALLBACKS, 0)
        for candidate in range(version, oldest, -1):
            if candidate == self._fleet.policy.version and candidate != version:
                return
            stored = await self._store.get_policy(candidate)
            try:
                policy = load(stored["document"], version=candidate)
            except KeyError:
                why = "it is not there"
            except DocumentError as error:
                why = str(error)
            else:
                self._fields = {name: stored.get(name, "") for name in ("author", "comment", "created_at_unix_ns")}
                self._adopt(policy)
                return
            if self._bad_version < candidate:
                self._bad_version = candidate
                _log.error("stored policy is not usable; the last good one stays", version=candidate, why=why)
            if self._fleet.policy.version > 0:
                return

    def _adopt(self, policy: Policy) -> None:
        _log.info(
            "policy in force",
            version=policy.version,
            before=self._fleet.policy.version,
            author=self._fields.get("author", ""),
            comment=self._fields.get("comment", ""),
        )
        self._fleet.policy = policy
        self._fleet.revision += 1
        self._fleet.wake_all()

    async def _keep_freezes(self, stored: dict[str, str], lost: bool) -> None:
        flags = self._fleet.freezes
        if lost:
            # A freeze that Redis forgot still holds.
            flags.unsaved.update(flags.dump())
        if flags.merge(stored):
            self._fleet.wake_all()
        await self.save_freezes()

    async def save_freezes(self) -> None:
        """Write the flags that Redis has not seen. StoreError leaves them for the next tick."""
        flags = self._fleet.freezes
        waiting = {key: text for key, text in flags.dump().items() if key in flags.unsaved}
        if waiting:
            await self._store.put_freezes(waiting)
            flags.unsaved.difference_update(waiting)

    async def _register(self) -> None:
        """Leases of this controller and of the hosts that are alive. Also how a full or read-only Redis is noticed."""
        heartbeat_seconds = self._fleet.heartbeat_seconds
        now = time.monotonic()
        hosts: dict[str, str] = {}
        if now - self._registry_at >= heartbeat_seconds:
            self._registry_at = now
            hosts = {
                host.node_id: json.dumps(
                    {
                        "controller_id": self.hub.controller_id,
                        "agent_version": host.agent_version,
                        "vms": len(host.vms),
                        "version": host.version_desired,
                    }
                )
                for host in self._fleet.hosts.values()
                if host.session is not None and now - host.last_seen <= 4 * heartbeat_seconds
            }
        lease_ms = int(4 * heartbeat_seconds * 1000)
        me = json.dumps({"epoch": self.hub.epoch, "policy_version": self._fleet.policy.version})

        def build(pipe: Any) -> None:
            pipe.set(f"{scripts.CONTROLLER}{self.hub.controller_id}", me, px=int(TICK_SECONDS * 5000))
            for node_id, text in hosts.items():
                pipe.set(f"{scripts.HOST}{node_id}", text, px=lease_ms)

        await self._store.write_batch(build)
