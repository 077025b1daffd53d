# SPDX-License-Identifier: Apache-2.0
"""What all sessions share: the fleet, the decider, the epoch, the admission limits and the commands under way."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from frostline.controller.fleet.deciding import Decider
from frostline.controller.fleet.fleet import Fleet
from frostline.controller.fleet.records import HostRecord, VmRecord
from frostline.controller.session.admission import FlapGuard, TokenBucket
from frostline.controller.session.validate import clean_identity
from frostline.v1 import common_pb2 as pb
from frostline.v1 import session_pb2 as wire

MAX_COMMANDS = 4096


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of everything that sessions do regularly or wait for."""

    heartbeat_seconds: float = 10.0
    report_seconds: float = 60.0
    lease_seconds: float = 180.0
    decide_seconds: float = 5.0
    ack_seconds: float = 15.0
    hello_seconds: float = 5.0
    streams_per_second: float = 50.0


@dataclass(slots=True)
class Commands:
    """Operators' commands whose results are still to come, the oldest forgotten first."""

    _waiting: OrderedDict[str, tuple[str, asyncio.Future[wire.CommandResult]]] = field(default_factory=OrderedDict)

    def start(self, node_id: str) -> tuple[str, asyncio.Future[wire.CommandResult]]:
        command_id = uuid.uuid4().hex
        future: asyncio.Future[wire.CommandResult] = asyncio.get_running_loop().create_future()
        self._waiting[command_id] = (node_id, future)
        while len(self._waiting) > MAX_COMMANDS:
            _, (_, oldest) = self._waiting.popitem(last=False)
            oldest.cancel()
        return command_id, future

    def finish(self, node_id: str, result: wire.CommandResult) -> None:
        """Take a result; one for another host's command, or for none, is ignored."""
        waiting = self._waiting.get(result.command_id)
        if waiting is not None and waiting[0] == node_id:
            del self._waiting[result.command_id]
            if not waiting[1].done():
                waiting[1].set_result(result)


class Hub:
    """One per controller."""

    def __init__(
        self,
        fleet: Fleet,
        decider: Decider,
        timing: Timing,
        raise_epoch: Callable[[int, str], Awaitable[None]],
    ) -> None:
        self.fleet = fleet
        self.decider = decider
        self.timing = timing
        self.controller_id = uuid.uuid4().hex
        self.epoch = 0  # 0: none yet, so no budgets
        self.commands = Commands()
        self.flaps = FlapGuard()
        self.streams = TokenBucket(timing.streams_per_second, max(2 * timing.streams_per_second, 10.0))
        self.closing = False
        self._raise_epoch = raise_epoch

    def take_identity(self, host: HostRecord, identity: pb.VmIdentity) -> VmRecord:
        """A VM that was said to exist; what is known of it stays unless it is another process now."""
        identity = clean_identity(identity)
        known = host.vms.get(identity.vm_id)
        if known is not None and (known.identity.pid, known.identity.start_time_ticks) == (
            identity.pid,
            identity.start_time_ticks,
        ):
            known.identity = identity
            record = known
        else:
            record = host.vms[identity.vm_id] = VmRecord(identity=identity)
        self.fleet.touch(record)
        return record

    async def raise_epoch(self, above: int, node_id: str) -> None:
        """Get an epoch above what an agent has seen, when ours is not."""
        if above > self.epoch:
            await self._raise_epoch(above, node_id)

    def end_all(self, text: str) -> None:
        """Every stream ends with UNAVAILABLE, so that agents come back to whoever is there next."""
        self.closing = True
        for host in self.fleet.hosts.values():
            if host.session is not None:
                host.session.close("UNAVAILABLE", text)
