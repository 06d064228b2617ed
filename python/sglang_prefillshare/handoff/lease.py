"""Who may read and write which pages, and until when: prefill's leases and decode's claims. No I/O, no SGLang.

    prefill   open ─┐                                          ┌─ confirm ─┐
                    ├─ lend pages … lend the last ── on loan ──┤           ├─ close
    decode    want ─┘                                          └─ fail ────┘

A room is one handoff. Its two halves may come in either order and may be given up at any point: what one side says
before the other half is there is remembered for the half that comes late. Pages on loan stay as they are until decode
has confirmed its copy, decode is gone, the loan is overdue, or prefill gives the room up, whichever comes first; the
lease's word (`lease_table.py`) is zeroed before any of the last three lets go of a page.

Where decode has more tensor-parallel ranks than prefill, several of them read one rank's room, each some of its heads:
pages are lent to all at once, when the last has asked, and are on loan until the last has confirmed.
"""

from __future__ import annotations

import collections
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Generic, TypeVar

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.lease_table import LeaseMark, LeaseTable

REMEMBERED_ROOMS: Final = 4096
"""How many rooms that ended on one side can still be named when the other half comes."""

DecodeTarget = TypeVar("DecodeTarget")


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a decode process asked for: so many pages of the room's KV. It is one of `readers`."""

    session: str
    page_count: int
    readers: int = 1


@dataclass(frozen=True, slots=True)
class Loan:
    """A finished loan, for the books: `held_s` from the last page lent to its end."""

    page_count: int
    held_s: float


@dataclass(slots=True)
class _Room:
    is_open: bool = False
    wanted: dict[str, Wanted] = field(default_factory=dict)
    confirmed: set[str] = field(default_factory=set)
    mark: LeaseMark | None = None
    lent_pages: int = 0
    on_loan_since: float | None = None
    is_confirmed: bool = False
    failure: str | None = None

    @property
    def is_asked_for(self) -> bool:
        """By everybody who is to read it."""
        return any(len(self.wanted) >= wanted.readers for wanted in self.wanted.values())


class LeaseBook:
    """Prefill's side of every room. Safe to call from several threads."""

    def __init__(self, table: LeaseTable, *, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._table = table
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.RLock()
        self._rooms: dict[int, _Room] = {}
        self._ended = _Remembered()  # by prefill; decode may still ask
        self._abandoned = _Remembered()  # by decode; prefill may still hear of it

    # ---- the two halves --------------------------------------------------------------------------------------------

    def open(self, room: int) -> str | None:
        """Prefill takes a room up. Returns why it is over already, if decode gave it up before."""
        with self._lock:
            self._rooms.setdefault(room, _Room()).is_open = True
            self._ended.pop(room)
            return self._abandoned.pop(room)

    def want(self, room: int, wanted: Wanted) -> str | None:
        """Decode asks for a room. Returns why it is over already, if prefill gave it up before."""
        with self._lock:
            if (reason := self._ended.pop(room)) is not None:
                if wanted.readers > 1:  # the others will ask, too
                    self._ended.add(room, reason)
                return reason
            entry = self._rooms.setdefault(room, _Room())
            entry.wanted[wanted.session] = wanted
            return entry.failure

    def is_asked_for(self, room: int) -> bool:
        """Whether everybody who is to read a room has asked for it."""
        with self._lock:
            entry = self._rooms.get(room)
            return entry is not None and entry.is_asked_for

    def abandon(self, room: int, reason: str) -> bool:
        """Decode gives a room up. True if prefill has it open; else it is forgotten here, but for the reason."""
        with self._lock:
            entry = self._rooms.get(room)
            if entry is not None and entry.is_open:
                return True
            self._rooms.pop(room, None)
            self._abandoned.add(room, reason)
            return False

    def leave(self, session: str, reason: str = "the decode worker died") -> tuple[list[int], list[int]]:
        """A decode process is gone. Its rooms that prefill has open, and those forgotten here, but for the reason."""
        with self._lock:
            found = [room for room, entry in self._rooms.items() if session in entry.wanted]
            orphans = [room for room in found if not self._rooms[room].is_open]
            for room in orphans:
                del self._rooms[room]
                self._abandoned.add(room, reason)
            return [room for room in found if room in self._rooms], orphans

    def failure(self, room: int) -> str | None:
        """Why an open room has failed; None while it has not."""
        with self._lock:
            entry = self._rooms.get(room)
            return entry.failure if entry is not None else None

    # ---- the loan --------------------------------------------------------------------------------------------------

    def lend(
        self, room: int, *, first: int, page_count: int, is_last: bool
    ) -> tuple[tuple[Wanted, ...], LeaseMark] | None:
        """Lend pages [first, first + page_count) of an open room to all who asked; None if the room is over.

        Raises `HandoffError` if they are not the next ones, or not as many in all as decode made room for.
        """
        with self._lock:
            entry = self._rooms.get(room)
            if entry is None or not entry.is_open or entry.failure is not None or entry.is_confirmed:
                return None
            if not entry.is_asked_for:
                raise HandoffError(f"room {room}: pages are lent to nobody; decode has not asked for them.")
            if first != entry.lent_pages or entry.on_loan_since is not None:
                raise HandoffError(f"room {room}: pages from {first} on were lent, wanted from {entry.lent_pages} on.")
            total = first + page_count
            readers = tuple(entry.wanted.values())
            for wanted in readers:
                if total > wanted.page_count or (is_last and total != wanted.page_count):
                    raise HandoffError(
                        f"room {room}: prefill holds {total} pages of the prompt, decode made room for "
                        f"{wanted.page_count}. The two sides tokenized the prompt differently."
                    )
            if entry.mark is None:
                entry.mark = self._table.grant()
            entry.lent_pages = total
            if is_last:
                entry.on_loan_since = self._clock()
            return readers, entry.mark

    def confirm(self, room: int, session: str) -> Loan | None:
        """A decode process has copied everything. The loan, if it was the last to do so.

        None too if the room is over, is not all lent, or is another decode process's.
        """
        with self._lock:
            entry = self._rooms.get(room)
            if entry is None or entry.failure is not None or entry.is_confirmed or entry.on_loan_since is None:
                return None
            if session not in entry.wanted:
                return None
            entry.confirmed.add(session)
            if len(entry.confirmed) < len(entry.wanted):
                return None
            entry.is_confirmed = True
            self._revoke(entry)
            return Loan(entry.lent_pages, self._clock() - entry.on_loan_since)

    def overdue(self, room: int) -> str | None:
        """Why a loan must not be waited for any longer; None while it may."""
        with self._lock:
            entry = self._rooms.get(room)
            if entry is None or entry.on_loan_since is None or entry.is_confirmed or entry.failure is not None:
                return None
            held_s = self._clock() - entry.on_loan_since
            if held_s < self._timeout_s:
                return None
            return (
                f"decode has not confirmed its copy of {entry.lent_pages} pages for {held_s:.1f} s. It is stuck or "
                "stopped; --prefill-share-lease-timeout sets how long prefill keeps pages for it."
            )

    def fail(self, room: int, reason: str) -> Loan | None:
        """End a room that cannot succeed any more, before any of its pages is released. The first reason stands.

        Returns the loan that ends with it, if there was one.
        """
        with self._lock:
            entry = self._rooms.get(room)
            if entry is None or entry.is_confirmed or entry.failure is not None:
                return None
            entry.failure = reason
            had_loan = entry.mark is not None
            self._revoke(entry)
            held_s = 0.0 if entry.on_loan_since is None else self._clock() - entry.on_loan_since
            return Loan(entry.lent_pages, held_s) if had_loan else None

    def close(self, room: int, reason: str) -> None:
        """Prefill leaves a room. If it did not succeed, a decode worker that asks later is told why."""
        with self._lock:
            entry = self._rooms.pop(room, None)
            if entry is None:
                return
            self._revoke(entry)
            if not entry.is_asked_for:
                self._ended.add(room, entry.failure or reason)

    # ---- what is held ----------------------------------------------------------------------------------------------

    @property
    def pages_on_loan(self) -> int:
        with self._lock:
            return sum(entry.lent_pages for entry in self._rooms.values() if entry.mark is not None)

    @property
    def room_count(self) -> int:
        with self._lock:
            return len(self._rooms)

    def _revoke(self, entry: _Room) -> None:
        if entry.mark is not None:
            self._table.revoke(entry.mark)
            entry.mark = None


@dataclass(slots=True)
class _Claim(Generic[DecodeTarget]):
    target: DecodeTarget
    lock: threading.Lock = field(default_factory=threading.Lock)
    is_released: bool = False


class ClaimBook(Generic[DecodeTarget]):
    """Decode's side: pages of its own into which a room's KV may be written, until the room is released.

    Writing and releasing one room exclude each other; different rooms do not wait for one another.
    """

    def __init__(self) -> None:
        self._claims: dict[int, _Claim[DecodeTarget]] = {}

    def claim(self, room: int, target: DecodeTarget) -> None:
        self._claims[room] = _Claim(target)

    def release(self, room: int) -> None:
        """Give a room's pages back: when this returns nothing is being written into them, and nothing will be."""
        claim = self._claims.pop(room, None)
        if claim is not None:
            with claim.lock:
                claim.is_released = True

    @contextmanager
    def writing(self, room: int) -> Iterator[DecodeTarget | None]:
        """The room's pages to write into, which stay claimed inside the block; None if they were given back."""
        claim = self._claims.get(room)
        if claim is None:
            yield None
            return
        with claim.lock:
            yield None if claim.is_released else claim.target

    def targets(self) -> list[DecodeTarget]:
        """What is claimed now."""
        return [claim.target for claim in list(self._claims.values())]


class _Remembered:
    """Why rooms ended, for the last few thousand of them."""

    def __init__(self) -> None:
        self._reasons: collections.OrderedDict[int, str] = collections.OrderedDict()

    def add(self, room: int, reason: str) -> None:
        self._reasons[room] = reason
        while len(self._reasons) > REMEMBERED_ROOMS:
            self._reasons.popitem(last=False)

    def pop(self, room: int) -> str | None:
        return self._reasons.pop(room, None)
