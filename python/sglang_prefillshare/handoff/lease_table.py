"""The words by which decode sees, without asking, whether a lease still holds.

One 64-bit word per lease in memory that prefill writes and decode workers map read-only: the lease's number while
prefill keeps the pages as they are, zero from the moment it gives them up. Decode copies first and looks afterwards.
If the word still bears the number, prefill had not given the pages up by then, so what was copied is what was lent: no
second message, and no waiting for prefill's threads.

Order matters on both sides: prefill zeroes the word before it releases a page, and a release takes locks; decode's copy
ends before its look, with a lock released and one taken in between.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.memory import RegionHandle, SharedRegion

SLOT_COUNT: Final = 65_536
"""Leases that may be held at once; half a MiB that takes memory only where it is used."""

_WORD_BYTES: Final = 8


@dataclass(frozen=True, slots=True)
class LeaseMark:
    """Where a lease's word is, and the number (1 to 2^63 - 1, never used twice) that it bears while the lease holds."""

    slot: int
    number: int


class LeaseTable:
    """Prefill's side: words are granted and revoked here."""

    def __init__(self, region: SharedRegion) -> None:
        self._region = region
        self._words = region.array(np.int64)
        self._free = list(range(SLOT_COUNT - 1, -1, -1))

    @classmethod
    def create(cls) -> LeaseTable:
        return cls(create_lease_region())

    @property
    def handle(self) -> RegionHandle:
        """How decode workers map the table."""
        return self._region.handle

    def grant(self) -> LeaseMark:
        """Begin a lease; raises `HandoffError` when all words are taken."""
        if not self._free:
            raise HandoffError(
                f"all {SLOT_COUNT} leases of this prefill worker are held. Decode workers do not confirm their copies: "
                "see prefillshare_pages_leased at /metrics, and restart the one that is stuck."
            )
        mark = LeaseMark(slot=self._free.pop(), number=secrets.randbits(63) or 1)
        self._words[mark.slot] = mark.number
        return mark

    def revoke(self, mark: LeaseMark) -> None:
        """End a lease, before its pages may change. Once per mark."""
        assert self._words[mark.slot] == mark.number, "a lease was revoked twice"
        self._words[mark.slot] = 0
        self._free.append(mark.slot)


def create_lease_region() -> SharedRegion:
    """Where the words of a prefill worker lie: none of them is a lease's."""
    return SharedRegion.create(SLOT_COUNT * _WORD_BYTES, name="prefillshare-leases")


class LeaseView:
    """Decode's side: the same words, read-only."""

    def __init__(self, handle: RegionHandle) -> None:
        if handle.size != SLOT_COUNT * _WORD_BYTES:
            raise HandoffError(
                f"prefill's lease table has {handle.size} bytes, wanted {SLOT_COUNT * _WORD_BYTES}. "
                "Run the same sglang-prefillshare version on prefill and decode."
            )
        self._region = SharedRegion.attach(handle)
        self._words = self._region.array(np.int64)
        self._lock = threading.Lock()

    def holds(self, mark: LeaseMark) -> bool:
        """Whether prefill still keeps the pages of this lease; look after the copy, not before."""
        if not 0 <= mark.slot < SLOT_COUNT:
            raise HandoffError(f"a lease names word {mark.slot} of {SLOT_COUNT}.")
        with self._lock:  # a lock taken here orders the look after the copy, whose own lock was released before
            return int(self._words[mark.slot]) == mark.number != 0  # zero is no lease's, but a free word's
