"""Whether a worker has room for a request: values in, a decision out (pure).

What does not fit now would wait inside a worker, where it holds what others need, or be retracted there. So it waits in
the router, where it costs nothing and its prefix may become cached meanwhile. `waiting` has the order of those that
wait, `gate` lets them through.

A worker's room is its pool less what requests hold there: ours as `holdings` counts them, each with all that it will
have generated, and others' by what the worker says is used beyond that. What the worker's cache can give up is room.
Where that is full, `peak_tokens` says how much of it will be held at one time: answers end one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sglang_prefillshare.protocol import Role, Room
from sglang_prefillshare.routing.config import AdmissionConfig


@dataclass(frozen=True, slots=True)
class Stock:
    """How full a worker is, in tokens; without a `room` nothing is known of it, and nothing limits it.

    `held_tokens` is what our legs there hold, `foreign_tokens` what others do, `leg_count` how many are ours.
    `backlog_tokens` is what its legs have to compute yet (prefill alone). A worker that `is_full` said so itself.
    """

    role: Role
    room: Room | None
    held_tokens: int = 0
    foreign_tokens: int = 0
    leg_count: int = 0
    backlog_tokens: int = 0
    is_full: bool = False


def has_room(stock: Stock, need_tokens: int, *, config: AdmissionConfig) -> bool:
    """Whether a request that adds `need_tokens` to what is held can go there now.

    A worker that carries nothing of ours takes every request that is larger than its pool: to refuse it with a reason
    is the worker's business. More is computed ahead on a prefill worker than `prefill_backlog_tokens` by one request at
    most: so it never waits for work, and what waits is in our order and not in its.
    """
    if stock.is_full:
        return False
    if stock.room is None:
        return True
    if stock.leg_count == 0 and need_tokens > stock.room.pool_tokens:
        return True
    if stock.role is Role.PREFILL and stock.backlog_tokens >= config.prefill_backlog_tokens:
        return False
    return stock.held_tokens + stock.foreign_tokens + need_tokens <= stock.room.pool_tokens


_LAG_TOKENS: Final = 4
"""By how much what came of an answer may be more or less than it has."""


def peak_tokens(answers: Iterable[tuple[int, int]], *, reserved_tokens: int = 0) -> int:
    """The most that answers hold at one time from now on, if each step gives one token to all that have not ended.

    Each is (tokens that came of it, tokens that it will have); one that has more is taken to go on for ever. Of a
    worker that keeps `reserved_tokens` free for each, it is not less than with those.
    """
    had = [(max(0, limit - came) if came <= limit + _LAG_TOKENS else math.inf, came) for came, limit in answers]
    had.sort(reverse=True)
    held = most = 0
    for count, (left, came) in enumerate(had, 1):  # those that are left when this one ends
        held += came + _LAG_TOKENS
        most = max(most, held + (0 if left == math.inf else count * int(left)))
    return max(most, held + reserved_tokens * len(had))


def foreign_tokens(room: Room | None, *, held_tokens: int) -> int:
    """What a worker holds that is not ours: health checks, other routers' requests, and what we take for too little.

    `held_tokens` is what our legs there hold, with all that they will have generated, which is more than they hold yet.
    """
    if room is None or room.running_requests + room.waiting_requests == 0:
        return 0
    return max(0, room.used_tokens - held_tokens)


def output_tokens(limits: Sequence[int | None], *, config: AdmissionConfig) -> list[int]:
    """What each of a request's answers is taken to have: its limit, or a share of it, as `config` says, and what that
    expects where the request sets no limit."""
    expected = (
        config.expected_output_tokens if limit is None else math.ceil(limit * config.output_share) for limit in limits
    )
    return [min(tokens, config.counted_output_tokens) for tokens in expected]


_MIN_RETRY_AFTER_S: Final = 1


def retry_after_s(ahead: int, *, admitted_per_s: float | None, config: AdmissionConfig) -> int:
    """When to come again, if `ahead` requests wait: once most of them are through, by the pace of late."""
    longest = math.ceil(config.queue_timeout_s)
    if not admitted_per_s:
        return max(_MIN_RETRY_AFTER_S, min(5, longest))
    return max(_MIN_RETRY_AFTER_S, min(longest, math.ceil(ahead / admitted_per_s)))


class Pace:
    """How much comes per second of late, such as requests: an average that forgets half in `half_life_s` seconds."""

    def __init__(self, *, half_life_s: float = 10.0) -> None:
        self._half_life_s = half_life_s
        self._count = 0.0  # weighted by age
        self._span_s = 0.0  # likewise
        self._last_s: float | None = None

    def note(self, now_s: float, count: float = 1.0) -> None:
        if self._last_s is not None:
            elapsed = max(0.0, now_s - self._last_s)
            kept = math.exp2(-elapsed / self._half_life_s)
            self._count = self._count * kept + count
            self._span_s = self._span_s * kept + elapsed
        self._last_s = now_s

    @property
    def per_s(self) -> float | None:
        """`None` until two were noted at different times."""
        return self._count / self._span_s if self._span_s > 0 else None
