# SPDX-License-Identifier: Apache-2.0
"""Decisions and pushed budgets on their way to Redis. Bounded: while Redis is away, the oldest decisions go."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import structlog

from frostline.controller.state import scripts
from frostline.controller.state.store import Failure, Store, StoreError
from frostline.controller.telemetry.metrics import Metrics

_log = structlog.get_logger(__name__)

MAX_WAITING = 10_000
BATCH = 500
FLUSH_SECONDS = 0.5
BUDGET_KEPT_SECONDS = 86400


class Journal:
    """Implements deciding.Journal."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._decisions: deque[dict[str, str]] = deque()
        self._budgets: dict[str, str] = {}  # latest wins, one per host
        self.dropped = 0

    def add_decision(self, fields: dict[str, str]) -> None:
        if len(self._decisions) >= MAX_WAITING:
            self._decisions.popleft()
            if self.dropped == 0:
                _log.warning("decisions are being dropped", why=f"{MAX_WAITING} wait for Redis already")
            self.dropped += 1
            self._metrics.count("journal.dropped")
        self._decisions.append(fields)

    def put_budgets(self, node_id: str, text: str) -> None:
        self._budgets[node_id] = text

    def __len__(self) -> int:
        return len(self._decisions)

    async def flush(self) -> bool:
        """Write one batch; True when nothing is left. StoreError leaves everything where it was."""
        batch = [self._decisions[index] for index in range(min(BATCH, len(self._decisions)))]
        budgets, self._budgets = self._budgets, {}
        if not batch and not budgets:
            return True

        def build(pipe: Any) -> None:
            for fields in batch:
                pipe.xadd(scripts.DECISIONS, fields, maxlen=scripts.MAX_DECISIONS, approximate=True)
            for node_id, text in budgets.items():
                pipe.set(f"{scripts.BUDGETS}{node_id}", text, ex=BUDGET_KEPT_SECONDS)

        try:
            await self._store.write_batch(build)
        except StoreError as error:
            if error.failure is not Failure.OTHER:
                self._budgets = {**budgets, **self._budgets}
                raise
            # Redis does not like what is in it, and will not like it better the next time.
            self.dropped += len(batch)
            self._metrics.count("journal.dropped", len(batch))
        # Overflow may have dropped some of the batch from the front meanwhile.
        for fields in batch:
            if self._decisions and self._decisions[0] is fields:
                self._decisions.popleft()
        return not self._decisions

    async def run(self) -> None:
        """Flush for ever, at most every FLUSH_SECONDS."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            try:
                while not await self.flush():
                    pass
            except StoreError:
                continue  # the store has said so; the next round tries again
