# SPDX-License-Identifier: Apache-2.0
"""Who may open a stream now: a limit on all, and one on agents that push each other out."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field

MAX_TRACKED_NODES = 65536


@dataclass(slots=True)
class TokenBucket:
    """`rate_per_second` on average, `burst` at once. The caller gives the time."""

    rate_per_second: float
    burst: float
    _tokens: float = field(init=False)
    _at: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._tokens = self.burst

    def take(self, now: float) -> float:
        """0.0 when a token was taken, else the seconds until the next one."""
        if self._at is not None:
            self._tokens = min(self.burst, self._tokens + max(now - self._at, 0.0) * self.rate_per_second)
        self._at = now
        if self._tokens >= 1.0:
            self._tokens -= 1.0
            return 0.0
        return (1.0 - self._tokens) / self.rate_per_second


@dataclass(slots=True)
class _Node:
    hellos: deque[tuple[float, bool]] = field(default_factory=deque)
    blocked_until: float = 0.0


@dataclass(slots=True)
class FlapGuard:
    """Two agents with one node id throw each other out for ever: stop that, and say what is wrong.

    More than `limit` hellos within `window_seconds` that each pushed another agent's open stream out, or more than
    `most` of any kind (an agent that keeps dying), block the node for `block_seconds`. While it is blocked the
    stream that is open stays. An agent that was restarted pushes nobody out: its old stream ended with it.
    """

    limit: int = 5
    most: int = 30
    window_seconds: float = 30.0
    block_seconds: float = 30.0
    _nodes: OrderedDict[str, _Node] = field(default_factory=OrderedDict)

    def admit(self, node_id: str, pushes_out: bool, now: float) -> tuple[float, str]:
        """(0.0, "") when the hello may go on, else the seconds to wait and what is wrong, in words.

        `pushes_out`: another agent instance has a stream open for this node.
        """
        node = self._nodes.setdefault(node_id, _Node())
        self._nodes.move_to_end(node_id)
        while len(self._nodes) > MAX_TRACKED_NODES:
            self._nodes.popitem(last=False)
        while node.hellos and now - node.hellos[0][0] > self.window_seconds:
            node.hellos.popleft()
        fights = sum(pushed for _, pushed in node.hellos) + pushes_out
        words = (
            f"several agents use the node id {node_id!r} and push each other out; give each host its own"
            if fights > 1
            else f"the agent of {node_id!r} connects too often; its log says why"
        )
        if now < node.blocked_until:
            return node.blocked_until - now, words
        node.hellos.append((now, pushes_out))
        if fights > self.limit or len(node.hellos) > self.most:
            node.blocked_until = now + self.block_seconds
            return self.block_seconds, words
        return 0.0, ""
