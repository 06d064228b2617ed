"""Lets requests through to their workers, at once where these have room; otherwise they wait here, holding nothing.

Before that, a session is held back as long as `residency` has no room for its context, and then one waits for another
that is having its prefix computed, where `sharing` says that this is shorter. `admission` says what has room, `waiting`
who is next, `placement` where to. Those that wait are looked at again when a leg ends, a poll tells something, or a
session has made no call for a while; nothing here polls. A request waits for `queue_timeout_s` at most, and leaves when
its client does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, TypeVar

from sglang_prefillshare.routing.admission import Pace, retry_after_s
from sglang_prefillshare.routing.client import ClientGoneError, Receive, wait_until_gone
from sglang_prefillshare.routing.config import AdmissionConfig
from sglang_prefillshare.routing.placement import Chains, NoRoom, Placed, Placer
from sglang_prefillshare.routing.request import ClientRequest
from sglang_prefillshare.routing.residency import Stay
from sglang_prefillshare.routing.telemetry import Metrics, Timings
from sglang_prefillshare.routing.waiting import Entry, Line
from sglang_prefillshare.routing.workers import Leg

_MOST_PASSED: Final = 16
_T = TypeVar("_T")


class Refusal(StrEnum):
    """Why a request was turned away; a label of the counter."""

    FULL = "queue_full"
    TIMEOUT = "queue_timeout"


class OverloadedError(Exception):
    """A request found no room in time; the message is for the client, who may come again after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True, eq=False)
class _Waiter:
    request: ClientRequest
    chains: Chains
    placed: asyncio.Future[Placed]
    since_s: float
    patience_s: float


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A call of a session that is held back."""

    request: ClientRequest
    chains: Chains
    stay: asyncio.Future[Stay]
    since_s: float
    is_new_session: bool


class Gate:
    """One for all requests of a router."""

    def __init__(self, config: AdmissionConfig, *, placer: Placer, metrics: Metrics) -> None:
        self._config = config
        self._placer = placer
        self._metrics = metrics
        self._line: Line[_Waiter] = Line()
        self._pace = Pace()
        self._held: list[_Held] = []  # in the order that they came
        self._look: asyncio.TimerHandle | None = None  # at those, again
        self._sharing_count = 0  # of those that wait for a prefix, and not for room
        self._body_bytes = 0  # of those that wait
        self._is_called = False

    def __len__(self) -> int:
        """How many wait."""
        return len(self._line) + len(self._held) + self._sharing_count

    def counts(self) -> dict[str, int]:
        """How many wait for room, by module; those that ever had any."""
        found = Counter(self._line.counts())
        found.update(held.request.module for held in self._held)
        return dict(found)

    async def enter(self, request: ClientRequest, chains: Chains, receive: Receive, *, timings: Timings) -> Placed:
        """The request's workers, with its legs counted there; the caller releases them. Returns without a switch of
        tasks if they have room and nobody waits; how long it waited is added to `timings`, whatever comes of it.

        Raises `OverloadedError`, `UnplacedError` where no worker is ready, also while it waits, and `ClientGoneError`.
        """
        if not self._config.is_on:
            return self._placer.place(request, chains)
        if not self._placer.needs_stay(request, chains):
            return await self._enter_line(request, chains, receive, None, timings=timings)
        stay = None
        if not self._held or self._placer.is_resident(request):
            stay = self._placer.stay(request, chains)
        if stay is None:
            stay = await self._hold_back(request, chains, receive, timings=timings)
        try:
            placed = await self._enter_line(request, chains, receive, stay, timings=timings)
        except BaseException:
            stay.end(time.monotonic())
            raise
        return dataclasses.replace(placed, stay=self._placer.moved(stay, request, chains, placed))

    async def _enter_line(
        self, request: ClientRequest, chains: Chains, receive: Receive, stay: Stay | None, *, timings: Timings
    ) -> Placed:
        under_way = self._placer.prefix_under_way(request, chains)
        if under_way is not None and len(self) < self._config.queue_size:
            await self._wait_for_prefix(*under_way, request, receive, timings=timings)
        if not self._line:
            placed = self._placer.place_where_room(request, chains)
            if isinstance(placed, Placed):
                self._pace.note(time.monotonic())
                return placed
        too_many = self._too_many(request)
        if too_many is not None and self._line.has(request.module):
            raise self._overloaded(request, Refusal.FULL, too_many)
        patience_s = self._config.patience_s
        if stay is not None and stay.is_worth_a_wait and self._config.session_hold_s is not None:
            patience_s = max(patience_s, self._config.session_hold_s)
        waiter = _Waiter(request, chains, asyncio.get_running_loop().create_future(), time.monotonic(), patience_s)
        is_new = self._placer.is_new_session(request)
        entry = Entry(waiter, request.module, request.session_key, request.priority, is_new)
        with self._booked(request):
            self._line.add(entry)
            try:
                self._let_through()
                if not waiter.placed.done():
                    if too_many is not None:
                        raise self._overloaded(request, Refusal.FULL, too_many)
                    longest_s = max(0.0, self._config.queue_timeout_s - timings.queue_ms / 1000)
                    if not await _is_done(waiter.placed, receive, longest_s=longest_s, timings=timings):
                        raise self._timed_out(request, "The workers had no room for the request within")
                return waiter.placed.result()
            except BaseException:
                if (granted := _granted(waiter.placed)) is not None:
                    granted.release()
                raise
            finally:
                self._line.remove(entry, is_served=False)

    def call(self) -> None:
        """Have those that wait looked at again, soon and once, however often it is called."""
        if (self._line or self._held) and not self._is_called:
            self._is_called = True
            asyncio.get_running_loop().call_soon(self._let_through)

    def clear(self) -> None:
        """Look at all that wait, now: with a placer that is stopping, all are told so."""
        self._let_through()

    async def _hold_back(self, request: ClientRequest, chains: Chains, receive: Receive, *, timings: Timings) -> Stay:
        """Until there is room for the context of the request's session."""
        if (too_many := self._too_many(request)) is not None:
            raise self._overloaded(request, Refusal.FULL, too_many)
        stay: asyncio.Future[Stay] = asyncio.get_running_loop().create_future()
        held = _Held(request, chains, stay, time.monotonic(), self._placer.is_new_session(request))
        self._metrics.session_holds.labels(request.module).inc()
        with self._booked(request):
            self._held.append(held)
            try:
                self.call()
                if not await _is_done(stay, receive, longest_s=self._config.queue_timeout_s, timings=timings):
                    raise self._timed_out(
                        request, "The contexts of other sessions filled the prefill workers' pools for"
                    )
                return stay.result()
            except BaseException:
                if (granted := _granted(stay)) is not None:
                    granted.end(time.monotonic())
                raise
            finally:
                if held in self._held:
                    self._held.remove(held)

    @contextlib.contextmanager
    def _booked(self, request: ClientRequest) -> Iterator[None]:
        """Counts a request, and its body, among those that wait; when it leaves, the others are looked at again."""
        queued = self._metrics.queued.labels(request.module)
        self._body_bytes += len(request.raw)
        queued.inc()
        try:
            yield
        finally:
            self._body_bytes -= len(request.raw)
            queued.dec()
            self.call()  # whoever comes next may need less

    def _let_in(self) -> None:
        """Sessions that there is room for now: those first that waited long enough, then those that run already. Who is
        next in a base and finds none keeps the others of it waiting."""
        now_s = time.monotonic()
        stuck: set[str | None] = set()
        for held in sorted(self._held, key=lambda held: (not self._is_due(held, now_s), held.is_new_session)):
            is_due = self._is_due(held, now_s)
            base = self._placer.base_of(held.request)
            if base in stuck:
                continue
            try:
                stay = self._placer.stay(held.request, held.chains, is_due=is_due)
            except Exception as error:  # no worker is ready; a bug of ours must not stop the others
                self._held.remove(held)
                held.stay.set_exception(error)
                continue
            if stay is None:
                stuck.add(base)
                continue
            self._held.remove(held)
            held.stay.set_result(stay)
        self._look_again()

    def _is_due(self, held: _Held, now_s: float) -> bool:
        assert self._config.session_hold_s is not None
        return now_s - held.since_s >= self._config.session_hold_s

    def _look_again(self) -> None:
        """When there may be room for a session that is held back, and nothing else would tell."""
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if not self._held:
            return
        now_s = time.monotonic()
        assert self._config.session_hold_s is not None
        times = [held.since_s + self._config.session_hold_s for held in self._held]
        times = [at_s for at_s in (*times, self._placer.residency.next_change_s(now_s)) if at_s is not None]
        later = [at_s for at_s in times if at_s > now_s]
        if later:
            self._look = asyncio.get_running_loop().call_later(min(later) - now_s, self.call)

    async def _wait_for_prefix(
        self, leg: Leg, longest_s: float, request: ClientRequest, receive: Receive, *, timings: Timings
    ) -> None:
        """Until `leg` has ended, however it did, and `longest_s` at most; then the request goes on as any other."""
        leg.ended = leg.ended or asyncio.Event()
        self._metrics.prefix_waits.labels(request.module).inc()
        self._sharing_count += 1
        ended = asyncio.ensure_future(leg.ended.wait())
        try:
            await _is_done(ended, receive, longest_s=longest_s, timings=timings)
        finally:
            ended.cancel()
            self._sharing_count -= 1

    def _let_through(self) -> None:
        """Everyone whose turn it is and whose workers have room.

        Who is next in a module and finds none keeps the rest of it waiting, and what they need is kept for them: so
        what is large goes through, too. Who waits for a worker by choice lets some others pass who go elsewhere.
        """
        self._is_called = False
        if self._held:
            self._let_in()
        blocked: set[str] = set()
        closed: set[str] = set()
        passed: list[Entry[_Waiter]] = []
        now_s = time.monotonic()
        while (entry := self._line.head(without=blocked, passed=passed)) is not None:
            waiter = entry.item
            is_patient = now_s - waiter.since_s < waiter.patience_s
            try:
                placed = self._placer.place_where_room(
                    waiter.request, waiter.chains, closed=closed, is_patient=is_patient
                )
            except Exception as error:  # no worker is ready; a bug of ours must not stop the line
                self._line.remove(entry, is_served=False)
                waiter.placed.set_exception(error)
                continue
            if isinstance(placed, NoRoom):
                closed |= placed.workers
                if placed.is_by_choice and len(passed) < _MOST_PASSED:
                    passed.append(entry)
                else:
                    blocked.add(entry.module)
                continue
            self._line.remove(entry, is_served=True)
            self._pace.note(now_s)
            waiter.placed.set_result(placed)

    def _too_many(self, request: ClientRequest) -> str | None:
        """Why one more may not wait, if that is so."""
        if len(self) >= self._config.queue_size:
            return f"{len(self)} requests wait already, and no more may (--queue-size)."
        if (self._line or self._held) and self._body_bytes + len(request.raw) > self._config.queue_bytes:
            return f"The requests that wait already have {self._body_bytes} bytes; with this one they are too many."
        return None

    def _timed_out(self, request: ClientRequest, why: str) -> OverloadedError:
        longest_s = self._config.queue_timeout_s
        return self._overloaded(request, Refusal.TIMEOUT, f"{why} {longest_s:g} s (--queue-timeout).")

    def _overloaded(self, request: ClientRequest, reason: Refusal, message: str) -> OverloadedError:
        self._metrics.refusals.labels(request.module, reason).inc()
        after_s = retry_after_s(len(self) + 1, admitted_per_s=self._pace.per_s, config=self._config)
        return OverloadedError(f"{message} Try again in {after_s} s.", retry_after_s=after_s)


def _granted(what: asyncio.Future[_T]) -> _T | None:
    """What somebody who does not wait for it any more was given all the same, and has to give back."""
    return what.result() if what.done() and not what.cancelled() and what.exception() is None else None


async def _is_done(what: asyncio.Future[Any], receive: Receive, *, longest_s: float, timings: Timings) -> bool:
    """Waits until it is, for `longest_s` at most, which is queue time. Raises `ClientGoneError`: nobody waits then."""
    began_s = time.monotonic()
    gone = asyncio.ensure_future(wait_until_gone(receive))
    try:
        await asyncio.wait((what, gone), timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            gone.result()
            raise ClientGoneError
    finally:
        gone.cancel()
        timings.queue_ms += (time.monotonic() - began_s) * 1000
    return what.done()
