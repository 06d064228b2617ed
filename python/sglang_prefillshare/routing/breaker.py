"""Whether a worker that keeps failing is given requests: a state machine with an injected clock, without I/O.

    closed ── failures_to_open in a row ──> open ── backoff_s later ──> half-open ── a success ──> closed
                                             ^                             │
                                             └────────── a failure ────────┘   (each time twice as long)

Half-open it lets one request through; a permit that is given back unused lets the next one. A worker that says it is
full (429, 503) has not failed. An answer of 5xx is a failure that one client's request, or somebody's abort, may have
caused: while fewer than `failures_to_open` connections broke, or were refused, which is the worker's own doing, others
have its requests if there are any (`is_avoided`), and no module is left without a worker (`is_shut`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from sglang_prefillshare.routing.config import BreakerConfig


class BreakerState(StrEnum):
    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Fault(StrEnum):
    """What a worker did wrong."""

    TRANSPORT = "transport"  # its connection broke, or it did not take one
    ANSWER = "answer"  # it answered 5xx


@dataclass(slots=True, eq=False)
class Permit:
    """One request's leave to go; `is_probe` for the one that tries whether the worker is well again."""

    is_probe: bool
    is_used: bool = False


class Breaker:
    """One worker's. `permit` before a request is sent, and then one of the other three with what it was given."""

    def __init__(self, config: BreakerConfig, *, now: Callable[[], float] = time.monotonic) -> None:
        self._config = config
        self._now = now
        self._failures = 0  # in a row
        self._transport_failures = 0  # among them
        self._is_of_transport = False  # they would do by themselves, or the probe failed so
        self._backoff_s = config.backoff_s
        self._opened_at: float | None = None
        self._probe: Permit | None = None
        self.opened_count = 0

    @property
    def state(self) -> BreakerState:
        if self._opened_at is None:
            return BreakerState.CLOSED
        return BreakerState.HALF_OPEN if self._now() - self._opened_at >= self._backoff_s else BreakerState.OPEN

    @property
    def is_avoided(self) -> bool:
        """Whether another worker, if there is one, should have the next request."""
        state = self.state
        return state is BreakerState.OPEN or (state is BreakerState.HALF_OPEN and self._probe is not None)

    @property
    def is_shut(self) -> bool:
        """Whether it gets no request, even if there is no other worker."""
        return self.is_avoided and self._is_of_transport

    @property
    def consecutive_failures(self) -> int:
        return self._failures

    def permit(self) -> Permit:
        """Count a request that goes to the worker; half-open, the first is the probe."""
        permit = Permit(is_probe=self.state is BreakerState.HALF_OPEN and self._probe is None)
        if permit.is_probe:
            self._probe = permit
        return permit

    def succeeded(self, permit: Permit) -> None:
        """The worker did its part. What was sent before it opened says nothing of it now."""
        if not self._take(permit) or (self._opened_at is not None and not permit.is_probe):
            return
        self._close()

    def failed(self, permit: Permit, fault: Fault) -> None:
        if not self._take(permit) or (self._opened_at is not None and not permit.is_probe):
            return
        self._failures += 1
        if fault is Fault.TRANSPORT:
            self._transport_failures += 1
            is_enough = self._transport_failures >= self._config.failures_to_open
            self._is_of_transport = self._is_of_transport or permit.is_probe or is_enough
        if permit.is_probe:
            self._backoff_s = min(2 * self._backoff_s, self._config.max_backoff_s)
            self._open()
        elif 0 < self._config.failures_to_open <= self._failures:
            self._open()

    def give_back(self, permit: Permit) -> None:
        """The request ended for a reason that says nothing of the worker. After another word it changes nothing."""
        self._take(permit)

    def reset(self) -> None:
        """Another process answers there now."""
        self._close()

    def _take(self, permit: Permit) -> bool:
        if permit.is_used:
            return False
        permit.is_used = True
        if self._probe is permit:
            self._probe = None
        return True

    def _open(self) -> None:
        self._opened_at = self._now()
        self.opened_count += 1

    def _close(self) -> None:
        self._failures = self._transport_failures = 0
        self._is_of_transport = False
        self._backoff_s = self._config.backoff_s
        self._opened_at = None
