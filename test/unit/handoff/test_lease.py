"""`handoff/lease.py`: any course of any rooms against a model of one room at a time, and real threads that race."""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import lease, lease_table
from sglang_prefillshare.handoff.copy import copy_pages, warm_up
from sglang_prefillshare.handoff.lease import ClaimBook, LeaseBook, Loan, Wanted
from sglang_prefillshare.handoff.lease_table import LeaseMark, LeaseTable, LeaseView
from sglang_prefillshare.handoff.memory import RegionHandle, SharedRegion
from sglang_prefillshare.handoff.pool import PoolView

TIMEOUT_S = 10.0
SLOTS = 2
ROOMS = range(3)
SESSIONS = ("ann", "bob", "cleo")


# ---- every course of events ----------------------------------------------------------------------------------------


class Phase(enum.Enum):
    """How far a room has come."""

    NOBODY = "neither half is there"
    WANTED = "only decode is"
    OPENED = "only prefill is"
    MET = "both are, nothing is lent"
    LENDING = "some pages are lent"
    ON_LOAN = "all pages are lent"
    CONFIRMED = "decode has its copy"
    FAILED = "it is over without one"


OPEN = {Phase.OPENED, Phase.MET, Phase.LENDING, Phase.ON_LOAN, Phase.CONFIRMED, Phase.FAILED}
LENT = {Phase.LENDING, Phase.ON_LOAN}


@dataclass
class Room:
    """What the model knows of a room from when one half comes until both have left."""

    phase: Phase = Phase.NOBODY
    wanted: Wanted | None = None
    lent: int = 0
    lent_at: float = 0.0
    mark: LeaseMark | None = None
    failure: str = ""


@functools.cache
def _region() -> SharedRegion:
    """One for all examples: a region lives as long as its process."""
    return SharedRegion.create(8 * SLOTS, name="test-leases")


class AnyCourseOfEvents(RuleBasedStateMachine):
    """Calls a `LeaseBook` as both halves of the backend do, in any order, and predicts each answer."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(lease_table, "SLOT_COUNT", SLOTS)
        self.words = _region().tensor(0, (SLOTS,), torch.int64)
        self.words.zero_()
        self.view = LeaseView(_region().handle)
        self.now = 0.0
        self.book = LeaseBook(LeaseTable(_region()), timeout_s=TIMEOUT_S, clock=lambda: self.now)
        self.rooms = {room: Room() for room in ROOMS}
        self.news_for_decode: dict[int, str] = {}  # why a room is over, for a half that has not come yet
        self.news_for_prefill: dict[int, str] = {}
        self.ends: dict[LeaseMark, str] = {}  # how each lease ended, by what the book answered
        self.reason_count = 0

    def reason(self) -> str:
        self.reason_count += 1
        return f"reason {self.reason_count}"

    # ---- prefill's calls ----

    @rule(room=st.sampled_from(ROOMS))
    def prefill_opens(self, room: int) -> None:
        known = self.rooms[room]
        if known.phase in OPEN:
            return
        assert self.book.open(room) == self.news_for_prefill.pop(room, None)
        self.news_for_decode.pop(room, None)  # that was about an earlier request
        known.phase = Phase.MET if known.phase is Phase.WANTED else Phase.OPENED

    @rule(room=st.sampled_from(ROOMS), is_last=st.booleans())
    def prefill_lends(self, room: int, is_last: bool) -> None:
        known = self.rooms[room]
        left = known.wanted.page_count - known.lent if known.wanted else 1
        page_count = left if is_last else min(1, left)
        if known.phase not in OPEN or known.phase in (Phase.CONFIRMED, Phase.FAILED):
            assert self.book.lend(room, first=known.lent, page_count=page_count, is_last=is_last) is None
            return
        is_full = known.mark is None and len(self.marks_on_loan()) == SLOTS
        if known.phase in (Phase.OPENED, Phase.ON_LOAN) or is_full:
            with pytest.raises(
                HandoffError, match="leases of this prefill worker" if is_full and known.wanted else f"room {room}: "
            ):
                self.book.lend(room, first=known.lent, page_count=page_count, is_last=is_last)
            return
        lent = self.book.lend(room, first=known.lent, page_count=page_count, is_last=is_last)
        assert lent is not None
        (wanted,), mark = lent
        assert wanted == known.wanted
        assert mark == known.mark if known.mark else mark not in self.ends
        known.mark = mark
        known.lent += page_count
        known.lent_at = self.now
        known.phase = Phase.ON_LOAN if is_last else Phase.LENDING

    @rule(room=st.sampled_from(ROOMS), how=st.sampled_from(["gap", "again", "too many", "too few"]), ends=st.booleans())
    def prefill_lends_other_pages_than_the_next(self, room: int, how: str, ends: bool) -> None:
        known = self.rooms[room]
        if known.wanted is None or known.phase not in OPEN:
            return
        left = known.wanted.page_count - known.lent
        first, page_count, is_last = {
            "gap": (known.lent + 1, 1, ends),
            "again": (known.lent - 1, 1, ends),
            "too many": (known.lent, left + 1, ends),
            "too few": (known.lent, left - 1, True),
        }[how]
        if first < 0 or page_count < 0:
            return
        if known.phase in (Phase.CONFIRMED, Phase.FAILED):
            assert self.book.lend(room, first=first, page_count=page_count, is_last=is_last) is None
            return
        with pytest.raises(HandoffError, match=f"room {room}: "):
            self.book.lend(room, first=first, page_count=page_count, is_last=is_last)

    @rule(room=st.sampled_from(ROOMS))
    def prefill_fails(self, room: int) -> None:
        if self.rooms[room].phase is not Phase.WANTED:  # what prefill has not opened is not prefill's to end
            self.fail(room, self.reason())

    @rule(room=st.sampled_from(ROOMS))
    def prefill_closes(self, room: int) -> None:
        known = self.rooms[room]
        if known.phase is Phase.WANTED:
            return
        reason = self.reason()
        self.book.close(room, reason)
        if known.phase in LENT:
            self.end(known, "closed")
        if known.phase in OPEN and known.wanted is None:
            self.news_for_decode[room] = known.failure or reason
        self.rooms[room] = Room()

    # ---- decode's ----

    @rule(room=st.sampled_from(ROOMS), session=st.sampled_from(SESSIONS), page_count=st.integers(0, 3))
    def decode_wants(self, room: int, session: str, page_count: int) -> None:
        known = self.rooms[room]
        if known.wanted is not None:
            return  # a room is one request, and asked for once
        wanted = Wanted(session, page_count)
        told = self.book.want(room, wanted)
        if room in self.news_for_decode:
            assert told == self.news_for_decode.pop(room)
            return
        assert told == (known.failure or None)
        known.wanted = wanted
        known.phase = {Phase.NOBODY: Phase.WANTED, Phase.OPENED: Phase.MET}.get(known.phase, known.phase)

    @rule(room=st.sampled_from(ROOMS), session=st.sampled_from(SESSIONS))
    def decode_confirms(self, room: int, session: str) -> None:
        known = self.rooms[room]
        loan = self.book.confirm(room, session)
        if known.phase is not Phase.ON_LOAN or known.wanted is None or known.wanted.session != session:
            assert loan is None
            return
        assert loan == Loan(known.lent, self.now - known.lent_at)
        self.end(known, "confirmed")
        known.phase = Phase.CONFIRMED

    @rule(room=st.sampled_from(ROOMS))
    def decode_abandons(self, room: int) -> None:
        reason = self.reason()
        if self.rooms[room].phase in OPEN:
            assert self.book.abandon(room, reason)
            self.fail(room, reason)
        else:
            assert not self.book.abandon(room, reason)
            self.news_for_prefill[room] = reason
            self.rooms[room] = Room()

    @rule(session=st.sampled_from(SESSIONS))
    def decode_dies(self, session: str) -> None:
        reason = self.reason()
        its = {room for room, known in self.rooms.items() if known.wanted and known.wanted.session == session}
        unopened = {room for room in its if self.rooms[room].phase is Phase.WANTED}
        open_rooms, orphans = self.book.leave(session, reason)
        assert (sorted(open_rooms), sorted(orphans)) == (sorted(its - unopened), sorted(unopened))
        for room in unopened:
            self.news_for_prefill[room] = reason
            self.rooms[room] = Room()
        for room in open_rooms:
            self.fail(room, reason)

    @rule(seconds=st.sampled_from([0.5, TIMEOUT_S - 0.5, TIMEOUT_S]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    # ---- both ----

    @initialize(
        fars=st.tuples(*[st.sampled_from(Phase)] * len(ROOMS)),
        sessions=st.tuples(*[st.sampled_from(SESSIONS)] * len(ROOMS)),
    )
    def handoffs_are_under_way(self, fars: tuple[Phase, ...], sessions: tuple[str, ...]) -> None:
        for room, far, session in zip(ROOMS, fars, sessions, strict=True):
            self.a_handoff_goes_well(room, far, session, page_count=2, is_prefill_first=False)

    @rule(
        room=st.sampled_from(ROOMS),
        far=st.sampled_from(Phase),
        session=st.sampled_from(SESSIONS),
        page_count=st.integers(0, 3),
        is_prefill_first=st.booleans(),
    )
    def a_handoff_goes_well(self, room: int, far: Phase, session: str, page_count: int, is_prefill_first: bool) -> None:
        """As far as the phase `far`, from wherever it is: so that most loans do not end before they have begun."""
        known = self.rooms[room]
        halves = [lambda: self.decode_wants(room, session, page_count), lambda: self.prefill_opens(room)]
        for step in (
            *(reversed(halves) if is_prefill_first else halves),
            lambda: self.prefill_lends(room, is_last=False),
            lambda: self.prefill_lends(room, is_last=True),
            lambda: known.wanted and self.decode_confirms(room, known.wanted.session),
        ):
            if known.phase is far:
                return
            step()

    # ---- what always holds ----

    @invariant()
    def a_word_is_held_exactly_while_pages_are_on_loan(self) -> None:
        marks = self.marks_on_loan()
        assert all(self.view.holds(mark) for mark in marks)
        words = {slot: number for slot, number in enumerate(self.words.tolist()) if number}
        assert words == {mark.slot: mark.number for mark in marks}
        assert not any(self.view.holds(mark) for mark in self.ends)

    @invariant()
    def pages_and_rooms_are_counted(self) -> None:
        rooms = self.rooms.values()
        assert self.book.pages_on_loan == sum(known.lent for known in rooms if known.phase in LENT)
        assert self.book.room_count == sum(known.phase is not Phase.NOBODY for known in rooms)

    @invariant()
    def a_loan_is_overdue_when_its_time_is_up_and_not_before(self) -> None:
        for room, known in self.rooms.items():
            is_late = known.phase is Phase.ON_LOAN and self.now - known.lent_at >= TIMEOUT_S
            assert (self.book.overdue(room) is not None) == is_late

    def teardown(self) -> None:
        try:
            self.everybody_leaves()
        finally:
            self.patch.undo()

    def everybody_leaves(self) -> None:
        for session in SESSIONS:
            self.decode_dies(session)
        for room in ROOMS:
            self.prefill_closes(room)
        assert all(known == Room() for known in self.rooms.values())
        self.pages_and_rooms_are_counted()
        assert self.book.room_count == self.book.pages_on_loan == 0
        assert not self.words.any()
        for room in ROOMS:  # whoever comes late is told once
            told = self.news_for_decode.get(room)
            for expected in (told, None):
                assert self.book.want(room, Wanted("dan", 1)) == expected
        self.book.leave("dan", "the end")
        for room in ROOMS:
            self.book.open(room)
            assert self.book.open(room) is None
            assert self.book.want(room, Wanted("eve", 1)) is None
        for room in ROOMS[:SLOTS]:  # no word is lost
            assert self.book.lend(room, first=0, page_count=1, is_last=True) is not None

    # ---- parts of rules ----

    def marks_on_loan(self) -> list[LeaseMark]:
        return [known.mark for known in self.rooms.values() if known.phase in LENT and known.mark]

    def fail(self, room: int, reason: str) -> None:
        known = self.rooms[room]
        loan = self.book.fail(room, reason)
        if known.phase in LENT:
            assert loan == Loan(known.lent, self.now - known.lent_at if known.phase is Phase.ON_LOAN else 0.0)
            self.end(known, "failed")
        else:
            assert loan is None
        if known.phase in OPEN - {Phase.CONFIRMED, Phase.FAILED}:
            known.phase = Phase.FAILED
            known.failure = reason

    def end(self, known: Room, how: str) -> None:
        assert known.mark is not None and known.mark not in self.ends, "a lease ended twice"
        self.ends[known.mark] = how


TestAnyCourseOfEvents = AnyCourseOfEvents.TestCase
TestAnyCourseOfEvents.settings = settings(max_examples=250, stateful_step_count=40, deadline=None)


# ---- one room ------------------------------------------------------------------------------------------------------

WANTED = Wanted("ann", page_count=5)


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> LeaseTable:
    monkeypatch.setattr(lease_table, "SLOT_COUNT", SLOTS)
    return LeaseTable.create()


@pytest.fixture
def book(table: LeaseTable, clock: Clock) -> LeaseBook:
    return LeaseBook(table, timeout_s=TIMEOUT_S, clock=clock)


def lend_all(book: LeaseBook, room: int, wanted: Wanted = WANTED) -> LeaseMark:
    """Both halves come, and all pages are lent."""
    assert book.want(room, wanted) is None
    assert book.open(room) is None
    lent = book.lend(room, first=0, page_count=wanted.page_count, is_last=True)
    assert lent is not None
    return lent[1]


@pytest.mark.parametrize("who_comes_first", ["prefill", "decode"])
def test_a_handoff_goes_well_whoever_comes_first(
    book: LeaseBook, table: LeaseTable, clock: Clock, who_comes_first: str
) -> None:
    view = LeaseView(table.handle)
    halves = [lambda: book.open(7), lambda: book.want(7, WANTED)]
    for half in halves if who_comes_first == "prefill" else reversed(halves):
        assert half() is None
    first = book.lend(7, first=0, page_count=2, is_last=False)
    assert first is not None and first[0] == (WANTED,) and view.holds(first[1])
    assert book.pages_on_loan == 2
    clock.now += 3
    assert book.lend(7, first=2, page_count=3, is_last=True) == first
    assert book.pages_on_loan == 5
    clock.now += 4
    assert book.confirm(7, "ann") == Loan(page_count=5, held_s=4)
    assert not view.holds(first[1])
    assert (book.pages_on_loan, book.room_count) == (0, 1)
    book.close(7, "unused")
    assert book.room_count == 0


def test_a_loan_is_overdue_at_its_timeout_and_not_before(book: LeaseBook, clock: Clock) -> None:
    lend_all(book, 7)
    clock.now += TIMEOUT_S - 0.001
    assert book.overdue(7) is None
    clock.now += 0.001
    found = book.overdue(7)
    assert found is not None
    assert "decode has not confirmed its copy of 5 pages for 10.0 s" in found
    assert "--prefill-share-lease-timeout" in found
    clock.now += 90.52
    assert "for 100.5 s" in str(book.overdue(7))


def test_only_a_loan_of_all_pages_that_has_not_ended_can_be_overdue(book: LeaseBook, clock: Clock) -> None:
    book.want(1, WANTED)
    book.open(1)
    book.lend(1, first=0, page_count=4, is_last=False)
    book.open(2)
    lend_all(book, 3)
    book.confirm(3, "ann")
    lend_all(book, 4)
    book.fail(4, "it broke")
    clock.now += 100 * TIMEOUT_S
    assert [book.overdue(room) for room in (1, 2, 3, 4, 5)] == [None] * 5


def test_a_loan_that_is_overdue_can_still_be_confirmed_until_prefill_gives_it_up(book: LeaseBook, clock: Clock) -> None:
    for room in (1, 2):
        lend_all(book, room)
    clock.now += 2 * TIMEOUT_S
    assert book.confirm(1, "ann") == Loan(5, 2 * TIMEOUT_S)
    assert book.fail(2, str(book.overdue(2))) == Loan(5, 2 * TIMEOUT_S)
    assert book.confirm(2, "ann") is None


def test_pages_are_lent_to_nobody_but_who_asked_for_them(book: LeaseBook) -> None:
    book.open(7)
    with pytest.raises(HandoffError, match="room 7: pages are lent to nobody; decode has not asked for them"):
        book.lend(7, first=0, page_count=1, is_last=False)
    assert book.pages_on_loan == 0


@pytest.mark.parametrize("first", [0, 1, 3, 5])
def test_pages_other_than_the_next_are_not_lent(book: LeaseBook, first: int) -> None:
    book.want(7, WANTED)
    book.open(7)
    book.lend(7, first=0, page_count=2, is_last=False)
    with pytest.raises(HandoffError, match=f"room 7: pages from {first} on were lent, wanted from 2 on"):
        book.lend(7, first=first, page_count=1, is_last=False)
    assert book.pages_on_loan == 2


@pytest.mark.parametrize(("page_count", "is_last"), [(6, True), (6, False), (4, True), (0, True)])
def test_more_or_fewer_pages_than_decode_made_room_for_are_not_lent(
    book: LeaseBook, table: LeaseTable, page_count: int, is_last: bool
) -> None:
    book.want(7, WANTED)
    book.open(7)
    message = f"room 7: prefill holds {page_count} pages of the prompt, decode made room for 5.*tokenized"
    with pytest.raises(HandoffError, match=message):
        book.lend(7, first=0, page_count=page_count, is_last=is_last)
    assert book.pages_on_loan == 0
    assert len([table.grant() for _ in range(SLOTS)]) == SLOTS, "no word is taken"


def test_a_prompt_that_decode_holds_already_is_handed_over_without_pages(book: LeaseBook, table: LeaseTable) -> None:
    mark = lend_all(book, 7, Wanted("ann", page_count=0))
    assert book.pages_on_loan == 0 and LeaseView(table.handle).holds(mark)
    assert book.confirm(7, "ann") == Loan(0, 0.0)


def test_a_loan_for_which_no_word_is_free_can_be_made_later(book: LeaseBook) -> None:
    for room in range(SLOTS):
        lend_all(book, room)
    book.want(9, WANTED)
    book.open(9)
    with pytest.raises(HandoffError, match=f"all {SLOTS} leases of this prefill worker are held"):
        book.lend(9, first=0, page_count=5, is_last=True)
    assert book.pages_on_loan == 5 * SLOTS
    book.confirm(0, "ann")
    assert book.lend(9, first=0, page_count=5, is_last=True) is not None


def test_the_first_reason_to_fail_stands(book: LeaseBook) -> None:
    book.open(7)
    book.fail(7, "the first")
    assert book.fail(7, "the second") is None
    book.close(7, "the third")
    assert book.want(7, WANTED) == "the first"


def test_what_decode_confirmed_does_not_fail_afterwards(book: LeaseBook) -> None:
    lend_all(book, 7)
    book.confirm(7, "ann")
    assert book.fail(7, "too late") is None
    assert book.want(7, WANTED) is None
    book.close(7, "prefill left")
    assert book.want(7, WANTED) is None


def test_what_failed_is_not_confirmed_afterwards(book: LeaseBook) -> None:
    lend_all(book, 7)
    assert book.fail(7, "it broke") == Loan(5, 0.0)
    assert book.confirm(7, "ann") is None
    book.close(7, "prefill left")
    assert book.confirm(7, "ann") is None


def test_a_room_number_that_is_used_again_says_nothing_of_its_earlier_use(book: LeaseBook) -> None:
    book.open(7)
    book.close(7, "prefill left")
    book.open(7)
    assert book.want(7, WANTED) is None
    assert book.lend(7, first=0, page_count=5, is_last=True) is not None


def test_a_failure_is_told_to_decode_once_whether_prefill_has_left_or_not(book: LeaseBook) -> None:
    book.open(1)
    book.fail(1, "it broke")
    assert book.want(1, WANTED) == "it broke"
    book.close(1, "prefill left")
    assert book.want(1, WANTED) is None, "decode was told before"
    book.open(2)
    book.close(2, "prefill left")
    assert [book.want(2, WANTED) for _ in range(2)] == ["prefill left", None]


def test_a_room_that_decode_gave_up_is_over_for_prefill_when_it_comes(book: LeaseBook) -> None:
    book.want(1, WANTED)
    assert not book.abandon(1, "decode gave up")
    assert not book.abandon(2, "decode never asked")
    assert book.room_count == 0
    assert [book.open(1), book.open(2)] == ["decode gave up", "decode never asked"]
    assert [book.open(1), book.open(2)] == [None, None]


def test_a_room_whose_decode_worker_died_is_over_for_prefill_when_it_comes(book: LeaseBook) -> None:
    book.want(1, WANTED)
    book.want(2, dataclasses.replace(WANTED, session="bob"))
    book.want(3, WANTED)
    book.open(3)
    assert book.leave("ann") == ([3], [1])
    assert book.open(1) == "the decode worker died"
    assert book.open(2) is None


def test_pages_of_a_room_that_prefill_has_left_are_not_lent_though_decode_asks_for_them_again(book: LeaseBook) -> None:
    lend_all(book, 7)
    book.close(7, "prefill left")
    book.want(7, WANTED)
    assert book.lend(7, first=0, page_count=5, is_last=True) is None
    assert book.pages_on_loan == 0


@pytest.mark.parametrize("end", ["confirm", "fail", "close"])
def test_a_lease_has_ended_before_the_book_lets_its_pages_go(book: LeaseBook, table: LeaseTable, end: str) -> None:
    view, mark = LeaseView(table.handle), lend_all(book, 7)
    assert view.holds(mark)
    {
        "confirm": lambda: book.confirm(7, "ann"),
        "fail": lambda: book.fail(7, "it broke"),
        "close": lambda: book.close(7, "prefill left"),
    }[end]()
    assert not view.holds(mark)


def test_only_the_last_rooms_that_ended_are_remembered(book: LeaseBook, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "REMEMBERED_ROOMS", 2)
    for room in (1, 2, 3):
        book.open(room)
        book.close(room, f"reason {room}")
        book.abandon(room + 10, f"reason {room}")
    assert [book.want(room, WANTED) for room in (1, 2, 3)] == [None, "reason 2", "reason 3"]
    assert [book.open(room + 10) for room in (1, 2, 3)] == [None, "reason 2", "reason 3"]


def test_of_a_confirmation_and_a_failure_at_the_same_time_one_counts(book: LeaseBook, table: LeaseTable) -> None:
    view = LeaseView(table.handle)
    with switching_threads_often():
        for room in range(300):
            mark = lend_all(book, room)
            loans: list[Loan] = []
            both = threading.Barrier(2)

            def run(end: Any, both: threading.Barrier = both, loans: list[Loan] = loans) -> None:
                both.wait()
                if (loan := end()) is not None:
                    loans.append(loan)

            ends = (functools.partial(book.confirm, room, "ann"), functools.partial(book.fail, room, "it broke"))
            threads = [threading.Thread(target=run, args=(end,)) for end in ends]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert loans == [Loan(5, 0.0)]
            assert not view.holds(mark)
            book.close(room, "the end")
    assert book.room_count == book.pages_on_loan == 0


def test_a_room_that_fails_while_its_pages_are_being_lent_leaves_no_word_held(
    book: LeaseBook, table: LeaseTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_lending, grant = threading.Event(), table.grant

    def grant_slowly() -> LeaseMark:
        is_lending.set()
        time.sleep(SOON_S)
        return grant()

    monkeypatch.setattr(table, "grant", grant_slowly)
    book.want(7, WANTED)
    book.open(7)
    lent: list[Any] = []
    lender = threading.Thread(target=lambda: lent.append(book.lend(7, first=0, page_count=5, is_last=True)))
    lender.start()
    assert is_lending.wait(DEADLINE_S)
    book.fail(7, "it broke")
    lender.join(DEADLINE_S)
    assert book.pages_on_loan == 0
    assert lent[0] is None or not LeaseView(table.handle).holds(lent[0][1])


# ---- decode copies while prefill may give up -----------------------------------------------------------------------

_PAGES, _PAGE_BYTES = 16, 65_536

_PREFILL = f"""
import dataclasses, json, random, time
import torch
from sglang_prefillshare.handoff.lease import LeaseBook, Wanted
from sglang_prefillshare.handoff.lease_table import LeaseTable
from sglang_prefillshare.handoff.memory import SharedRegion
pool, post = SharedRegion.create({_PAGES * _PAGE_BYTES}, name="test-pool"), SharedRegion.create(16, name="test-post")
table = LeaseTable.create()
print(json.dumps([dataclasses.asdict(each.handle) for each in (pool, post, table)]), flush=True)
pages, letter = pool.tensor(0, ({_PAGES}, {_PAGE_BYTES} // 8), torch.int64), post.tensor(0, (2,), torch.int64)
pages, letter = pages.numpy(), letter.numpy()
book, room = LeaseBook(table, timeout_s=60), 0
while True:
    room += 1
    book.open(room)
    book.want(room, Wanted("ann", {_PAGES}))
    _, mark = book.lend(room, first=0, page_count={_PAGES}, is_last=True)
    pages[:] = mark.number
    letter[1] = mark.slot
    letter[0] = mark.number  # from here on decode knows of the loan
    time.sleep(random.uniform(0, 0.001))
    book.fail(room, "prefill gives it up")
    pages[:] = -room  # another request's, from now on
    book.close(room, "the end")
"""


def test_a_copy_of_pages_whose_lease_holds_after_it_is_exact() -> None:
    warm_up()
    process = subprocess.Popen([sys.executable, "-c", _PREFILL], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        handles = [RegionHandle(**handle) for handle in json.loads(process.stdout.readline())]
        pool, post, leases = SharedRegion.attach(handles[0]), SharedRegion.attach(handles[1]), LeaseView(handles[2])
        source = PoolView.at([pool.address], [_PAGE_BYTES], _PAGES, owner=pool)
        target = np.zeros((_PAGES, _PAGE_BYTES // 8), np.int64)
        onto = PoolView.of_tensors([torch.from_numpy(target)])
        letter = post.tensor(0, (2,), torch.int64).numpy()
        order = np.arange(_PAGES, dtype=np.int32)
        good = late = spoiled = 0
        deadline = time.monotonic() + 10
        while (good < 100 or spoiled < 10) and time.monotonic() < deadline:
            number, slot = letter.tolist()
            if number == 0:
                continue
            copy_pages(source, onto, order, order)
            is_exact = bool((target == number).all())
            if leases.holds(LeaseMark(slot, number)):
                assert is_exact
                good += 1
            else:
                late += 1
                spoiled += not is_exact
        assert good >= 100, (good, late, spoiled)
        assert spoiled >= 10, (good, late, spoiled)
    finally:
        process.kill()
        process.communicate()


# ---- decode's claims -----------------------------------------------------------------------------------------------

SOON_S = 0.2
"""Long enough for a thread to get where it would block."""

DEADLINE_S = 10.0


@contextmanager
def switching_threads_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@dataclass
class Writer:
    """A thread that is inside `writing` until it is let go."""

    book: ClaimBook[str]
    room: int
    found: list[str | None] = field(default_factory=list)
    is_inside: threading.Event = field(default_factory=threading.Event)
    may_leave: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._write, daemon=True)
        self.thread.start()

    def _write(self) -> None:
        with self.book.writing(self.room) as target:
            self.found.append(target)
            self.is_inside.set()
            self.may_leave.wait(DEADLINE_S)

    def leave(self) -> None:
        self.may_leave.set()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


def found_in(book: ClaimBook[str], room: int) -> str | None:
    with book.writing(room) as target:
        return target


def finishes(call: Any, within_s: float = DEADLINE_S) -> bool:
    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(within_s)
    return not thread.is_alive()


def test_claimed_pages_can_be_written_until_they_are_released() -> None:
    book: ClaimBook[str] = ClaimBook()
    assert found_in(book, 1) is None
    book.claim(1, "pages of 1")
    book.claim(2, "pages of 2")
    assert [found_in(book, room) for room in (1, 2, 1)] == ["pages of 1", "pages of 2", "pages of 1"]
    assert book.targets() == ["pages of 1", "pages of 2"]
    book.release(1)
    assert [found_in(book, room) for room in (1, 2)] == [None, "pages of 2"]
    assert book.targets() == ["pages of 2"]
    book.release(1)
    book.release(99)
    book.claim(1, "other pages")
    assert found_in(book, 1) == "other pages"


def test_pages_are_not_released_while_they_are_being_written_and_not_written_afterwards() -> None:
    book: ClaimBook[str] = ClaimBook()
    book.claim(1, "pages")
    writer = Writer(book, 1)
    assert writer.is_inside.wait(DEADLINE_S) and writer.found == ["pages"]
    release = threading.Thread(target=book.release, args=(1,), daemon=True)
    release.start()
    release.join(SOON_S)
    assert release.is_alive(), "release waits for the writer"
    assert found_in(book, 1) is None, "but nobody else may begin to write"
    writer.leave()
    release.join(DEADLINE_S)
    assert not release.is_alive()
    assert found_in(book, 1) is None


def test_rooms_do_not_wait_for_one_another() -> None:
    book: ClaimBook[str] = ClaimBook()
    for room in (1, 2, 3):
        book.claim(room, f"pages of {room}")
    writer = Writer(book, 1)
    assert writer.is_inside.wait(DEADLINE_S)
    other = Writer(book, 2)
    assert other.is_inside.wait(DEADLINE_S) and other.found == ["pages of 2"]
    assert finishes(lambda: book.release(3))
    assert finishes(lambda: book.claim(4, "pages of 4"))
    assert finishes(book.targets)
    other.leave()
    assert finishes(lambda: book.release(2))
    assert not finishes(lambda: book.release(1), within_s=SOON_S)
    writer.leave()


def test_a_write_that_breaks_off_lets_go_of_the_pages() -> None:
    book: ClaimBook[str] = ClaimBook()
    book.claim(1, "pages")
    with pytest.raises(HandoffError, match="broken"), book.writing(1):
        raise HandoffError("broken")
    assert finishes(lambda: book.release(1))


def test_no_write_ever_lands_in_pages_that_were_released() -> None:
    """Writers stamp whatever room they are told of; the pages of a room that is over are soon another's."""
    page_count, per_room, room_count = 12, 3, 4
    pages = np.zeros(page_count, np.int64)
    book: ClaimBook[list[int]] = ClaimBook()
    is_over = threading.Event()
    stamped = [0, 0]
    wrong: list[str] = []

    def write(writer: int) -> None:
        while not is_over.is_set():
            for room in range(1, room_count + 1):
                with book.writing(room) as target:
                    if target is None:
                        continue
                    for page in target:
                        if pages[page] not in (0, room):
                            wrong.append(f"page {page} of room {room} was stamped by {pages[page]}")
                        pages[page] = room
                    stamped[writer] += 1

    threads = [threading.Thread(target=write, args=(writer,), daemon=True) for writer in (0, 1)]
    random = np.random.default_rng(1)
    free = list(range(page_count))
    owned: dict[int, list[int]] = {}
    rounds = 0
    with switching_threads_often():
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline and not wrong:
            room = int(random.integers(1, room_count + 1))
            if room not in owned:
                owned[room], free = free[:per_room], free[per_room:]
                book.claim(room, owned[room])
                continue
            book.release(room)
            released = owned.pop(room)
            pages[released] = 0  # whoever gets them next
            time.sleep(0)
            if pages[released].any():
                wrong.append(f"pages {released} of room {room} were stamped after their release")
            free += released
            rounds += 1
        is_over.set()
        for thread in threads:
            thread.join(DEADLINE_S)
    assert wrong == []
    assert rounds > 100 and min(stamped) > 100, (rounds, stamped)


# ---- several ranks of decode read one rank of prefill ----------------------------------------------------------------

TWO = (Wanted("ann", page_count=5, readers=2), Wanted("ben", page_count=5, readers=2))


def test_pages_are_lent_when_the_last_reader_has_asked_and_are_back_when_the_last_has_confirmed(
    book: LeaseBook, table: LeaseTable
) -> None:
    book.open(7)
    assert book.want(7, TWO[0]) is None
    assert not book.is_asked_for(7)
    with pytest.raises(HandoffError, match="room 7: pages are lent to nobody"):
        book.lend(7, first=0, page_count=5, is_last=True)
    assert book.want(7, TWO[1]) is None
    assert book.is_asked_for(7)
    lent = book.lend(7, first=0, page_count=5, is_last=True)
    assert lent is not None and lent[0] == TWO
    view = LeaseView(table.handle)
    assert book.confirm(7, "ann") is None and book.confirm(7, "ann") is None
    assert view.holds(lent[1]) and book.pages_on_loan == 5
    assert isinstance(book.confirm(7, "ben"), Loan)
    assert not view.holds(lent[1]) and book.pages_on_loan == 0


def test_readers_that_made_room_for_different_prompts_get_nothing(book: LeaseBook) -> None:
    book.open(7)
    book.want(7, TWO[0])
    book.want(7, Wanted("ben", page_count=4, readers=2))
    with pytest.raises(HandoffError, match="decode made room for 4"):
        book.lend(7, first=0, page_count=5, is_last=True)


def test_the_death_of_one_reader_ends_the_room_and_both_are_told_of_a_room_that_prefill_left(book: LeaseBook) -> None:
    book.open(7)
    book.want(7, TWO[0])
    book.want(7, TWO[1])
    assert book.leave("ben") == ([7], [])
    book.open(8)
    assert book.fail(8, "out of memory") is None
    book.close(8, "left")
    assert [book.want(8, wanted) for wanted in TWO] == ["out of memory", "out of memory"]
