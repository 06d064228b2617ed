"""`handoff/lease_table.py`, with the words of another process, and with another process that looks at ours."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import json
import mmap
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import lease_table
from sglang_prefillshare.handoff.lease_table import LeaseMark, LeaseTable, LeaseView
from sglang_prefillshare.handoff.memory import RegionHandle, SharedRegion

SLOTS = 4

_PREFILL = """
import dataclasses, json, sys
from sglang_prefillshare.handoff.lease_table import LeaseMark, LeaseTable
table = LeaseTable.create()
print(json.dumps(dataclasses.asdict(table.handle)), flush=True)
for line in sys.stdin:
    mark = json.loads(line)
    if mark is None:
        print(json.dumps(dataclasses.asdict(table.grant())), flush=True)
    else:
        table.revoke(LeaseMark(**mark))
        print("null", flush=True)
"""

_WRITING_DECODE = """
import ctypes, json, resource, sys
from sglang_prefillshare.handoff.lease_table import LeaseMark, LeaseView
from sglang_prefillshare.handoff.memory import RegionHandle
handle, mark = json.loads(sys.argv[1])
view = LeaseView(RegionHandle(**handle))
assert view.holds(LeaseMark(**mark))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # no core file
print("attached", flush=True)
ctypes.memset(view._region.address + 8 * mark["slot"], 0, 8)  # past numpy, which would refuse it
print("written", flush=True)
"""


class PrefillProcess:
    """Another process, whose table of leases is looked at from here."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PREFILL], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.handle = RegionHandle(**self._answer())
        assert self.handle.pid == self._process.pid

    def grant(self) -> LeaseMark:
        return LeaseMark(**self._ask(None))

    def revoke(self, mark: LeaseMark) -> None:
        self._ask(dataclasses.asdict(mark))

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, question: Any) -> Any:
        assert self._process.stdin is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())


@pytest.fixture
def prefill() -> Iterator[PrefillProcess]:
    prefill = PrefillProcess()
    try:
        yield prefill
    finally:
        prefill.kill()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> LeaseTable:
    """A table of `SLOTS` words."""
    monkeypatch.setattr(lease_table, "SLOT_COUNT", SLOTS)
    return LeaseTable.create()


# ---- across processes ----------------------------------------------------------------------------------------------


def test_another_process_sees_a_lease_hold_until_it_is_revoked(prefill: PrefillProcess) -> None:
    view = LeaseView(prefill.handle)
    first, second = prefill.grant(), prefill.grant()
    assert view.holds(first) and view.holds(second)
    prefill.revoke(first)
    assert not view.holds(first) and view.holds(second)
    late = LeaseView(prefill.handle)
    assert not late.holds(first) and late.holds(second)
    again = prefill.grant()
    assert again.slot == first.slot and view.holds(again) and not view.holds(first)
    prefill.revoke(second)
    prefill.revoke(again)
    assert not any(each.holds(mark) for each in (view, late) for mark in (first, second, again))


def test_what_a_lease_was_when_prefill_died_can_still_be_looked_up(prefill: PrefillProcess) -> None:
    view = LeaseView(prefill.handle)
    held, given_up = prefill.grant(), prefill.grant()
    prefill.revoke(given_up)
    prefill.kill()
    assert view.holds(held) and not view.holds(given_up)
    with pytest.raises(HandoffError, match="cannot map the KV pool of process"):
        LeaseView(prefill.handle)


def test_a_peer_that_writes_a_word_is_killed_and_the_lease_holds_on() -> None:
    table = LeaseTable.create()
    mark = table.grant()
    argument = json.dumps([dataclasses.asdict(table.handle), dataclasses.asdict(mark)])
    decode = subprocess.run([sys.executable, "-c", _WRITING_DECODE, argument], stdout=subprocess.PIPE, check=False)
    assert (decode.stdout, decode.returncode) == (b"attached\n", -signal.SIGSEGV)
    assert LeaseView(table.handle).holds(mark)
    table.revoke(mark)


def test_a_peer_cannot_make_its_mapping_writable(small: LeaseTable) -> None:
    view = LeaseView(small.handle)
    libc = ctypes.CDLL(None, use_errno=True)
    address = ctypes.c_void_p(view._region.address)
    assert libc.mprotect(address, ctypes.c_size_t(8 * SLOTS), mmap.PROT_READ | mmap.PROT_WRITE) == -1
    assert ctypes.get_errno() == errno.EACCES


@pytest.mark.parametrize("size", [0, 8 * SLOTS - 8, 8 * SLOTS + 8, 16 * SLOTS])
def test_a_table_of_another_size_is_refused(small: LeaseTable, size: int) -> None:
    message = f"lease table has {size} bytes, wanted {8 * SLOTS}. Run the same sglang-prefillshare version"
    with pytest.raises(HandoffError, match=message):
        LeaseView(dataclasses.replace(small.handle, size=size))


def test_a_region_that_is_not_as_large_as_it_was_said_to_be_is_refused(small: LeaseTable) -> None:
    other = SharedRegion.create(8 * SLOTS - 8, name="test-leases")
    with pytest.raises(HandoffError, match=f"offered {8 * SLOTS} bytes, the region has {8 * SLOTS - 8}"):
        LeaseView(dataclasses.replace(other.handle, size=8 * SLOTS))


# ---- words and numbers ---------------------------------------------------------------------------------------------


def test_a_new_table_has_no_lease_that_holds(small: LeaseTable) -> None:
    view = LeaseView(small.handle)
    assert not any(view.holds(LeaseMark(slot, number)) for slot in range(SLOTS) for number in (1, 2**63 - 1))


def test_no_lease_has_the_number_zero_that_a_revoked_word_bears(small: LeaseTable) -> None:
    view = LeaseView(small.handle)
    assert not view.holds(LeaseMark(slot=0, number=0))
    mark = small.grant()
    small.revoke(mark)
    assert not view.holds(dataclasses.replace(mark, number=0))


def test_the_number_zero_is_never_granted(small: LeaseTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda _bits: 0)
    assert small.grant().number != 0


def test_the_largest_number_fits_its_word(small: LeaseTable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "randbits", lambda bits: 2**bits - 1)
    mark = small.grant()
    assert mark.number == 2**63 - 1 and LeaseView(small.handle).holds(mark)
    small.revoke(mark)


def test_no_number_is_granted_twice(small: LeaseTable) -> None:
    numbers = set()
    for _ in range(20_000):
        mark = small.grant()
        numbers.add(mark.number)
        small.revoke(mark)
    assert len(numbers) == 20_000
    assert min(numbers) >= 1 and max(numbers) < 2**63


def test_an_old_mark_does_not_hold_again_when_its_word_is_granted_anew(small: LeaseTable) -> None:
    view = LeaseView(small.handle)
    old = small.grant()
    small.revoke(old)
    marks = [small.grant() for _ in range(SLOTS)]
    assert old.slot in {mark.slot for mark in marks}
    assert all(view.holds(mark) for mark in marks) and not view.holds(old)


def test_a_lease_beyond_the_last_word_is_refused_until_another_ends(small: LeaseTable) -> None:
    marks = [small.grant() for _ in range(SLOTS)]
    assert sorted(mark.slot for mark in marks) == list(range(SLOTS))
    view = LeaseView(small.handle)
    for _ in range(2):
        with pytest.raises(HandoffError, match=f"all {SLOTS} leases of this prefill worker are held.*restart the one"):
            small.grant()
        assert all(view.holds(mark) for mark in marks)
    small.revoke(marks[2])
    assert small.grant().slot == marks[2].slot


def test_a_lease_ends_once(small: LeaseTable) -> None:
    first = small.grant()
    small.revoke(first)
    with pytest.raises(AssertionError, match="revoked twice"):
        small.revoke(first)
    second = small.grant()
    assert second.slot == first.slot
    with pytest.raises(AssertionError, match="revoked twice"):
        small.revoke(first)
    assert LeaseView(small.handle).holds(second)


@pytest.mark.parametrize("slot", [-1, SLOTS, 2**64 - 1])
def test_a_mark_outside_the_table_is_refused(small: LeaseTable, slot: int) -> None:
    with pytest.raises(HandoffError, match=f"a lease names word {slot} of {SLOTS}"):
        LeaseView(small.handle).holds(LeaseMark(slot, 1))


@pytest.mark.parametrize("number", [-1, -(2**63), 2**63, 2**64 - 1])
def test_a_number_that_no_word_can_bear_does_not_hold(small: LeaseTable, number: int) -> None:
    view = LeaseView(small.handle)
    small.grant()
    assert not any(view.holds(LeaseMark(slot, number)) for slot in range(SLOTS))


@settings(deadline=None)
@given(data=st.data())
def test_exactly_the_leases_that_are_held_hold(data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lease_table, "SLOT_COUNT", SLOTS)
        table = LeaseTable(_REGION)
        view = LeaseView(_REGION.handle)
        held: list[LeaseMark] = []
        ended: list[LeaseMark] = []
        for is_grant in data.draw(st.lists(st.booleans(), max_size=30)):
            if is_grant and len(held) < SLOTS:
                held.append(table.grant())
            elif not is_grant and held:
                ended.append(held.pop(data.draw(st.integers(0, len(held) - 1))))
                table.revoke(ended[-1])
            assert all(view.holds(mark) for mark in held)
            assert not any(view.holds(mark) for mark in ended)
        for mark in held:
            table.revoke(mark)


_REGION = SharedRegion.create(8 * SLOTS, name="test-leases")
"""One for all examples: a region lives as long as its process."""
