# SPDX-License-Identifier: Apache-2.0
"""The controller as a whole: put together, started, and ended in good order."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc.aio
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from frostline.controller.api.operator import OperatorService
from frostline.controller.config import Settings
from frostline.controller.fleet.deciding import Decider
from frostline.controller.fleet.fleet import Fleet
from frostline.controller.gauges import Gauges
from frostline.controller.session.hub import Hub
from frostline.controller.session.service import SessionService
from frostline.controller.state.journal import Journal
from frostline.controller.state.keeper import Keeper
from frostline.controller.state.private import PrivateRedis
from frostline.controller.state.store import Store, StoreError
from frostline.controller.telemetry.metrics import Metrics
from frostline.v1 import operator_pb2, operator_pb2_grpc, session_pb2, session_pb2_grpc
from frostline.wire.channels import Address, bind, make_server
from frostline.wire.telemetry import Telemetry

_log = structlog.get_logger(__name__)

FIRST_TICK_SECONDS = 6.0
STOP_SECONDS = 3.0
FLUSH_SECONDS = 3.0
PICTURE_SECONDS = 1.0


class Controller:
    """One controller. `start`, then `stop`; both at most once."""

    def __init__(self, settings: Settings, telemetry: Telemetry) -> None:
        self.settings = settings
        self.metrics = Metrics(telemetry.meter("frostline.controller"))
        self.private: PrivateRedis | None = None
        self.address: Address | None = None
        self.fleet = Fleet(settings.heartbeat_seconds, settings.report_seconds)
        self._tracer = telemetry.tracer("frostline.controller")
        self._server: grpc.aio.Server | None = None
        self._health: health.aio.HealthServicer | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._operator: OperatorService | None = None
        self.store: Store
        self.hub: Hub
        self._journal: Journal

    async def start(self) -> None:
        """PrivateRedisError, AddressError or BindError when it cannot; what had been started is ended again."""
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise

    async def _start(self) -> None:
        # The address first: nobody should wait for a Redis to learn that the port is taken.
        self._server = make_server()
        self.address = bind(self._server, self.settings.listen)
        url = self.settings.redis_url
        if not url:
            self.private = PrivateRedis(self.settings.data_dir, self.metrics)
            _log.info("no Redis URL given: starting a private redis-server", data=str(self.settings.data_dir))
            await self.private.start()
            url = self.private.url
        self.store = Store(url, self.metrics)
        self._journal = Journal(self.store, self.metrics)
        keeper = Keeper(self.store, self.fleet, self.metrics)
        decider = Decider(self.fleet, self._journal, self.metrics, self._tracer)
        self.hub = Hub(self.fleet, decider, self.settings.timing(), keeper.raise_epoch)
        keeper.attach(self.hub)
        try:
            async with asyncio.timeout(FIRST_TICK_SECONDS):
                await keeper.tick()
        except (TimeoutError, StoreError):
            _log.error(
                "starting without Redis",
                consequence="the built-in policy (plan) is in force and no budgets are sent until Redis answers",
                url=self.store.url,
            )
        self._operator = OperatorService(self.fleet, self.hub, self.store, keeper)
        gauges = Gauges(self.fleet, self.hub, self.store, self._operator.watchers, self.metrics)
        await self._serve(self._server, self._operator)
        for name, work in (
            ("keeper", keeper.run()),
            ("journal", self._journal.run()),
            ("picture", self._keep_picture(gauges)),
        ):
            self._tasks.append(asyncio.create_task(work, name=name))
        _log.info(
            "controller ready",
            listen=str(self.address),
            controller_id=self.hub.controller_id,
            epoch=self.hub.epoch,
            policy_version=self.fleet.policy.version,
            redis=self.store.url,
        )

    async def _serve(self, server: grpc.aio.Server, operator: OperatorService) -> None:
        session_pb2_grpc.add_SessionServiceServicer_to_server(SessionService(self.hub), server)
        operator_pb2_grpc.add_OperatorServiceServicer_to_server(operator, server)
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        for name in ("", *_service_names()):
            await self._health.set(name, health_pb2.HealthCheckResponse.SERVING)
        names = (*_service_names(), health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        await server.start()

    async def _keep_picture(self, gauges: Gauges) -> None:
        while True:
            started = time.monotonic()
            try:
                self.fleet.forget_gone()
                gauges.refresh()
            except Exception:
                _log.exception("refreshing the metrics failed; trying again")
            # In a large fleet this takes a while; it may have a twentieth of the time.
            await asyncio.sleep(max(PICTURE_SECONDS, 20 * (time.monotonic() - started)))

    async def stop(self) -> None:
        """Streams end with UNAVAILABLE, waiting decisions are written, a private Redis is ended last."""
        if self._health is not None:
            await self._health.enter_graceful_shutdown()
        if self._operator is not None:
            self.hub.end_all("the controller is stopping; connect again")
            self._operator.watchers.closing.set()
        if self._server is not None:
            await self._server.stop(STOP_SECONDS)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=STOP_SECONDS)
        self._tasks.clear()
        if self._operator is not None:
            await self._last_words()
            await self.store.close()
        if self.private is not None:
            await self.private.stop()

    async def _last_words(self) -> None:
        try:
            async with asyncio.timeout(FLUSH_SECONDS):
                while not await self._journal.flush():
                    pass
        except (TimeoutError, StoreError) as error:
            _log.error("decisions not kept", count=len(self._journal), why=str(error) or "Redis is too slow")


def _service_names() -> tuple[str, ...]:
    files: tuple[Any, ...] = (session_pb2, operator_pb2)
    return tuple(service.full_name for file in files for service in file.DESCRIPTOR.services_by_name.values())
