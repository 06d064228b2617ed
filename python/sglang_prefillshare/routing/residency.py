"""Whose contexts the pools of the prefill workers are kept for (pure).

A session that waits for its own next turn holds nothing, and yet its context is worth keeping: where a pool has room
for every request but not for all contexts, sessions evict one another's in turn, and each turn computes its context
anew. So a worker's pool is dealt out to sessions, as an operating system deals out memory to processes. The rest wait
in the router until one that has room makes no call any more, or for so long that it is their turn.

That pays where sessions come back soon, as agents do, and where computing is what others wait for: `Residency` sees the
first for itself, and is told of the second (`Pressure`).
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Final

from sglang_prefillshare.routing.admission import Pace
from sglang_prefillshare.routing.holdings import Hold, Holdings

_BUSY_SHARE: Final = 0.8
_DEMAND_SHARE: Final = 0.5
"""Of what a worker computes at its fastest: it shares processors and links with others."""
_RETURN_SHARE: Final = 0.5
_MIN_ENDS: Final = 8.0
"""Of calls, before it is known whether sessions come back."""
_KEPT: Final = 0.99
"""Of what is known, with each end of a call."""
_SWAP_SHARE: Final = 0.05
"""Of a worker's time, that may go into contexts which are computed again because their sessions had to go."""
_FILL_SHARE: Final = 0.9
"""Of a pool, up to which sessions come in; the rest is for contexts that grow further than expected."""
_GROWN_WEIGHT: Final = 0.1
"""Of each session that ends, in the average of how large contexts become."""

SessionName = tuple[str | None, str]
"""The base whose KV its context is, and the session's key."""


@dataclass(slots=True, eq=False)
class _Resident:
    """A session whose context a worker keeps: the prompt of its latest call."""

    name: SessionName
    worker: str
    context: Hold
    since: int
    """Residents came in the order of these numbers."""
    calls: int = 0
    """That wait, or are under way."""
    turns: int = 0
    """Calls that it ever made."""


@dataclass(slots=True)
class _Pool:
    holdings: Holdings
    residents: set[_Resident] = field(default_factory=set)
    next_swap_s: float = 0.0

    def grown_tokens(self, each: float, more: Hold) -> float:
        """What the residents' contexts and `more` will have, once they have grown to `each`."""
        contexts = [more, *(resident.context for resident in self.residents)]
        growth = sum(max(0.0, each - self.holdings.size(context)) for context in contexts)
        return self.holdings.tokens + self.holdings.need(more) + growth


class Stay:
    """A call of a resident; it `is_worth_a_wait` where its context would have to be computed anew elsewhere, and that
    would be long."""

    def __init__(self, residency: Residency, resident: _Resident, *, is_worth_a_wait: bool) -> None:
        self._residency = residency
        self._resident = resident
        self.is_worth_a_wait = is_worth_a_wait
        self._is_ended = False

    @property
    def worker(self) -> str:
        return self._resident.worker

    def end(self, now_s: float) -> None:
        """The call is over; doing it again changes nothing."""
        if not self._is_ended:
            self._is_ended = True
            self._residency.call_ended(self._resident, now_s)


class Pressure:
    """Whether prefill is what requests wait for on a worker, or would be if each call computed its whole context: else
    sessions may push one another's contexts out.

    Of its busy time and its demand half is forgotten in `half_life_s` seconds.
    """

    def __init__(self, *, half_life_s: float = 5.0) -> None:
        self._half_life_s = half_life_s
        self._busy_share = 0.0
        self._is_busy = False
        self._noted_s = 0.0
        self._demand = Pace(half_life_s=half_life_s)

    def begins(self, tokens: int, now_s: float) -> None:
        """A call comes whose whole prompt has so many."""
        self._demand.note(now_s, tokens)

    def note(self, is_busy: bool, now_s: float) -> None:
        """From now on it has something to do, or nothing."""
        self._busy_share, self._is_busy, self._noted_s = self.busy_share(now_s), is_busy, now_s

    def busy_share(self, now_s: float) -> float:
        kept = math.exp2(-max(0.0, now_s - self._noted_s) / self._half_life_s)
        return self._busy_share * kept + (1 - kept) * self._is_busy

    def is_high(self, now_s: float, *, tokens_per_s: float | None) -> bool:
        """`tokens_per_s` is how fast it computes, where that is known."""
        if self.busy_share(now_s) >= _BUSY_SHARE:
            return True
        demand = self._demand.per_s
        return tokens_per_s is not None and demand is not None and demand >= _DEMAND_SHARE * tokens_per_s


class Residency:
    """The residents of all prefill workers. One that made no call for `idle_s` is none any more."""

    def __init__(self, *, block_tokens: int, idle_s: float) -> None:
        self._block_tokens = block_tokens
        self._idle_s = idle_s
        self._residents: dict[SessionName, _Resident] = {}
        self._pools: dict[str, _Pool] = {}
        self._idle: OrderedDict[SessionName, float] = OrderedDict()  # since when; in the order of that
        self._count = 0
        self._ends = self._returns = 0.0  # of calls, and after how many the next one came in time; weighted by age
        self._grown_tokens = 0.0

    def __len__(self) -> int:
        return len(self._residents)

    def has(self, name: SessionName) -> bool:
        return name in self._residents

    def held_tokens(self, worker: str) -> int:
        """Of all residents' contexts."""
        pool = self._pools.get(worker)
        return 0 if pool is None else pool.holdings.tokens

    def enter(
        self,
        name: SessionName,
        worker: str,
        context: Hold,
        *,
        pool_tokens: int | None,
        now_s: float,
        is_due: bool = False,
        compute_s: float = 0.0,
    ) -> Stay | None:
        """A call of the session, whose context is now this one; None where the worker's pool has no room for it. A pool
        of None has room for all, as every pool does as long as sessions do not come back.

        Contexts are taken to grow to what those of sessions that ended had of late. Where those of the residents grew
        too large nonetheless, the one that came last has to go, be it this one: it waits from its next call on. One
        that `is_due`, since it waited long enough, takes the place of those that came first, as often as the time that
        it takes to compute contexts again, `compute_s` seconds for this one, is small beside all other time.
        """
        self.sweep(now_s)
        if name in self._idle:
            self._note_end(is_return=True)
        if not self._come_back():
            pool_tokens = None
        resident = self._residents.get(name)
        if resident is not None and resident.worker != worker:
            self._leave(resident)
            resident = None
        pool = self._pools.get(worker)
        if pool is None:
            pool = self._pools[worker] = _Pool(Holdings(block_tokens=self._block_tokens))
        is_swap = False
        if resident is not None:
            pool.holdings.give_back(resident.context)
            resident.context = context
        else:
            limit = math.inf if pool_tokens is None or not pool.residents else _FILL_SHARE * pool_tokens
            if pool.grown_tokens(self._grown_tokens, context) > limit:
                if not is_due or now_s < pool.next_swap_s:
                    return None
                is_swap = True
                pool.next_swap_s = now_s + compute_s / _SWAP_SHARE
            self._count += 1
            resident = _Resident(name, worker, context, since=self._count)
            self._residents[name] = resident
            pool.residents.add(resident)
        pool.holdings.take(context)
        while pool_tokens is not None and pool.holdings.tokens > pool_tokens and len(pool.residents) > 1:
            others = pool.residents - {resident} if is_swap else pool.residents
            leaving = (min if is_swap else max)(others, key=lambda one: one.since)
            self._leave(leaving)
            if leaving is resident:
                return None
        resident.calls += 1
        resident.turns += 1
        self._idle.pop(name, None)
        return Stay(self, resident, is_worth_a_wait=pool_tokens is not None)

    def call_ended(self, resident: _Resident, now_s: float) -> None:
        resident.calls -= 1
        if not resident.calls and self._residents.get(resident.name) is resident:
            self._idle[resident.name] = now_s

    def sweep(self, now_s: float) -> None:
        """Those that made no call for a while are no residents any more."""
        while self._idle:
            name, since_s = next(iter(self._idle.items()))
            if since_s + self._idle_s > now_s:
                return
            self._note_end(is_return=False)
            resident = self._residents[name]
            if resident.turns > 1:
                grown = self._pools[resident.worker].holdings.size(resident.context)
                self._grown_tokens += _GROWN_WEIGHT * (grown - self._grown_tokens) if self._grown_tokens else grown
            self._leave(resident)

    def next_change_s(self, now_s: float) -> float | None:
        """When there may be room that there is not now, even if no call ends before; None where only that can help."""
        times = [pool.next_swap_s for pool in self._pools.values() if pool.next_swap_s > now_s]
        if self._idle:
            times.append(next(iter(self._idle.values())) + self._idle_s)
        return min(times, default=None)

    def forget(self, workers: set[str]) -> None:
        """Workers lost their KV, or are gone."""
        for worker in workers & self._pools.keys():
            for resident in list(self._pools[worker].residents):
                self._leave(resident)

    def _note_end(self, *, is_return: bool) -> None:
        self._ends = self._ends * _KEPT + 1
        self._returns = self._returns * _KEPT + is_return

    def _come_back(self) -> bool:
        return self._ends >= _MIN_ENDS and self._returns >= _RETURN_SHARE * self._ends

    def _leave(self, resident: _Resident) -> None:
        pool = self._pools[resident.worker]
        pool.residents.remove(resident)
        pool.holdings.give_back(resident.context)
        if not pool.residents:
            del self._pools[resident.worker]
        del self._residents[resident.name]
        self._idle.pop(resident.name, None)
