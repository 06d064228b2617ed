"""The order in which waiting requests are let through: fair between modules and between sessions (no I/O, no waiting).

Modules take turns. Within a module the larger `priority` goes first, as SGLang has it, and a request without one last;
among equals a running session's next turn before a new session's first, since its KV is still there; among those,
sessions take turns, and a session's own go in the order they came. Every `OLDEST_TURN`th of a module is the one that
waits longest, whatever it is, so that none waits for ever.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

OLDEST_TURN: Final = 4

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class Entry(Generic[T]):
    """One waiting request; `item` is the caller's."""

    item: T
    module: str
    session: str | None
    priority: int | None
    is_new_session: bool
    key: tuple[float, bool, int, int] = field(default=(0.0, False, 0, 0))


class Lane(Generic[T]):
    """One module's."""

    def __init__(self) -> None:
        self._by_arrival: OrderedDict[int, Entry[T]] = OrderedDict()
        self._heap: list[tuple[tuple[float, bool, int, int], Entry[T]]] = []
        self._of_session: dict[tuple[str, int | None], Entry[T]] = {}  # the last that came
        self._session_counts: Counter[tuple[str, int | None]] = Counter()
        self._turn_of_sessions = 0
        self.served_count = 0

    def __len__(self) -> int:
        return len(self._by_arrival)

    def add(self, entry: Entry[T], *, arrival: int) -> None:
        is_new, turn = entry.is_new_session, self._turn_of_sessions
        name = None if entry.session is None else (entry.session, entry.priority)
        before = None if name is None else self._of_session.get(name)
        if before is not None:  # never ahead of what its session sent earlier
            _, was_new, before_turn, _ = before.key
            is_new, turn = is_new or was_new, max(turn, before_turn + 1)
        entry.key = (-_rank(entry.priority), is_new, turn, arrival)
        if name is not None:
            self._of_session[name] = entry
            self._session_counts[name] += 1
        self._by_arrival[arrival] = entry
        heapq.heappush(self._heap, (entry.key, entry))

    def head(self, *, passed: Collection[Entry[T]] = ()) -> Entry[T] | None:
        """Who is next, but for those `passed`; does not change until somebody is served, leaves, or comes."""
        if not self._by_arrival:
            return None
        if passed:
            others = [entry for entry in self._by_arrival.values() if entry not in passed]
            return min(others, key=lambda entry: entry.key, default=None)
        if self.served_count % OLDEST_TURN == OLDEST_TURN - 1:
            return next(iter(self._by_arrival.values()))
        while self._heap[0][1].key[3] not in self._by_arrival:
            heapq.heappop(self._heap)
        return self._heap[0][1]

    def remove(self, entry: Entry[T], *, is_served: bool) -> None:
        if self._by_arrival.pop(entry.key[3], None) is None:
            return
        if entry.session is not None:
            name = (entry.session, entry.priority)
            self._session_counts[name] -= 1
            if not self._session_counts[name]:
                del self._session_counts[name], self._of_session[name]
        if is_served:
            self.served_count += 1
            self._turn_of_sessions = max(self._turn_of_sessions, entry.key[2])
        if len(self._heap) > 2 * len(self._by_arrival) + 16:  # of those that left
            self._heap = [(one.key, one) for one in self._by_arrival.values()]
            heapq.heapify(self._heap)


class Line(Generic[T]):
    """All that wait, bounded by the caller."""

    def __init__(self) -> None:
        self._lanes: OrderedDict[str, Lane[T]] = OrderedDict()  # the module that was served longest ago first
        self._arrivals = 0
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry[T]]:
        for lane in self._lanes.values():
            yield from lane._by_arrival.values()

    def counts(self) -> dict[str, int]:
        """By module, with those that had any."""
        return {module: len(lane) for module, lane in self._lanes.items()}

    def has(self, module: str) -> bool:
        """Whether any of the module wait."""
        lane = self._lanes.get(module)
        return lane is not None and len(lane) > 0

    def add(self, entry: Entry[T]) -> None:
        self._arrivals += 1
        self._count += 1
        self._lanes.setdefault(entry.module, Lane()).add(entry, arrival=self._arrivals)

    def head(self, *, without: Collection[str] = (), passed: Collection[Entry[T]] = ()) -> Entry[T] | None:
        """Who is next, but for modules in `without` and those `passed`; None where nobody is."""
        for module, lane in self._lanes.items():
            if module in without:
                continue
            entry = lane.head(passed=[one for one in passed if one.module == module])
            if entry is not None:
                return entry
        return None

    def remove(self, entry: Entry[T], *, is_served: bool) -> None:
        """Take out one that was served, or leaves. Doing it again changes nothing."""
        lane = self._lanes[entry.module]
        before = len(lane)
        lane.remove(entry, is_served=is_served)
        self._count -= before - len(lane)
        if is_served:
            self._lanes.move_to_end(entry.module)


def _rank(priority: int | None) -> float:
    return -float("inf") if priority is None else priority
