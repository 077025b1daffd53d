# SPDX-License-Identifier: Apache-2.0
"""Feeds the gauges. They are read on the exporter's thread, so the picture is taken on the loop and only read there."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial

from frostline.controller.api.watch import Watchers
from frostline.controller.fleet.fleet import Fleet
from frostline.controller.session.hub import Hub
from frostline.controller.state.store import Store
from frostline.controller.telemetry.metrics import Attributes, Metrics
from frostline.v1 import operator_pb2 as op

_STATES = {op.HOST_STATE_CONNECTED: "connected", op.HOST_STATE_SUSPECT: "suspect", op.HOST_STATE_GONE: "gone"}


@dataclass(frozen=True)
class Picture:
    """Sums over the fleet at one moment."""

    hosts: dict[str, int] = field(default_factory=dict)
    vms: dict[str, int] = field(default_factory=dict)
    sums: dict[str, int] = field(default_factory=dict)


class Gauges:
    def __init__(self, fleet: Fleet, hub: Hub, store: Store, watchers: Watchers, metrics: Metrics) -> None:
        self._fleet = fleet
        self._picture = Picture()
        for name in ("evicted", "resident", "pool", "budget", "planned"):
            metrics.observe(f"memory.{name}", partial(self._sum, name))
        metrics.observe("hosts", lambda: [(count, {"state": state}) for state, count in self._picture.hosts.items()])
        metrics.observe("vms", lambda: [(count, {"mode": mode}) for mode, count in self._picture.vms.items()])
        metrics.observe("epoch", lambda: [(hub.epoch, {})])
        metrics.observe("policy.version", lambda: [(fleet.policy.version, {})])
        metrics.observe("fleet.frozen", lambda: [(int(fleet.freezes.fleet is not None), {})])
        metrics.observe("store.available", lambda: [(int(store.available), {})])
        metrics.observe("watchers", lambda: [(watchers.open, {})])

    def _sum(self, name: str) -> list[tuple[int, Attributes]]:
        return [(self._picture.sums.get(name, 0), {})]

    def refresh(self) -> None:
        """Take the picture anew."""
        hosts = Counter({"connected": 0, "suspect": 0, "gone": 0})
        vms = Counter({"off": 0, "observe": 0, "plan": 0, "enforce": 0})
        sums: Counter[str] = Counter()
        for host in self._fleet.hosts.values():
            hosts[_STATES.get(self._fleet.host_state(host), "gone")] += 1
        for _, vm in self._fleet.vms():
            if vm.decision is not None:
                vms[vm.decision.mode.name.lower()] += 1
                sums["budget"] += vm.decision.budget_bytes
                sums["planned"] += vm.decision.planned_bytes
            if vm.state is not None:
                sums["evicted"] += vm.state.evicted_bytes
                sums["resident"] += vm.state.resident_bytes
                sums["pool"] += vm.state.pool_bytes
        self._picture = Picture(dict(hosts), dict(vms), dict(sums))
