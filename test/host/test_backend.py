"""What no request shows: a copy counts only if the loan still held after it, and pages given back are not written."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.disaggregation.base.conn import KVPoll  # noqa: E402 - after SGLang's plugins, as in a server

from sglang_prefillshare.handoff import messages  # noqa: E402
from sglang_prefillshare.handoff.copy import copy_pages  # noqa: E402
from sglang_prefillshare.handoff.geometry import KVGeometry  # noqa: E402
from sglang_prefillshare.handoff.lease import ClaimBook, LeaseBook, Wanted  # noqa: E402
from sglang_prefillshare.handoff.lease_table import LeaseMark, LeaseTable, LeaseView  # noqa: E402
from sglang_prefillshare.handoff.pool import PoolView  # noqa: E402
from sglang_prefillshare.host.transfer import decode_end, prefill_end, wakeup  # noqa: E402

ROOM, SESSION, PAGES = 7, "decode", 4


def bare(kind: type, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[messages.Message]]:
    """A manager without sockets, threads or servers, with one room; what it sends is recorded instead."""
    manager = object.__new__(kind)
    sent: list[messages.Message] = []
    manager.request_status = {ROOM: KVPoll.WaitingForInput}
    manager.deferred_bootstrap = None
    manager.failure_records = {}
    manager.failure_lock = _NoLock()
    manager.transfer_infos = {}
    manager.geometry = KVGeometry(page_size=1, kv_dtype="torch.float32", page_bytes=(8, 8))
    manager.send = lambda _host, _port, message: sent.append(message)
    monkeypatch.setattr(wakeup, "wake", lambda: None)
    return manager, sent


class _NoLock:
    def __enter__(self) -> None: ...

    def __exit__(self, *_error: object) -> None: ...


# ---- prefill ------------------------------------------------------------------------------------------------------


@pytest.fixture
def prefill(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[messages.Message]]:
    """A prefill manager with an open room that decode wants."""
    manager, sent = bare(prefill_end.PrefillKVManager, monkeypatch)
    manager._lease_table = LeaseTable.create()
    manager.leases = LeaseBook(manager._lease_table, timeout_s=0.05)
    manager._announcer = None
    manager.metadata = [np.zeros((2, 8), dtype=np.uint8)]
    manager._peers = {SESSION: prefill_end._DecodePeer("127.0.0.1", 1)}
    manager.leases.open(ROOM)
    manager.leases.want(ROOM, Wanted(SESSION, PAGES))
    return manager, sent


def lend_all(manager: Any, sent: list[messages.Message]) -> LeaseMark:
    manager.add_transfer_request(ROOM, np.arange(PAGES, dtype=np.int32), slice(0, PAGES), True, aux_index=0)
    pages = sent[-1]
    assert isinstance(pages, messages.Pages)
    return LeaseMark(pages.lease_slot, pages.lease_number)


def test_a_confirmed_room_succeeds(prefill: tuple[Any, list[messages.Message]]) -> None:
    manager, sent = prefill
    lend_all(manager, sent)
    manager.handle(messages.Pulled(room=ROOM, session=SESSION))
    assert manager.request_status[ROOM] == KVPoll.Success
    assert manager.leases.pages_on_loan == 0


def test_a_failure_ends_the_loan_before_anybody_can_see_it(
    prefill: tuple[Any, list[messages.Message]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler releases pages as soon as it sees Failed: by then decode must not take its copy for good."""
    manager, sent = prefill
    mark, view = lend_all(manager, sent), LeaseView(manager._lease_table.handle)
    assert view.holds(mark)
    seen: list[bool] = []

    class Statuses(dict[int, KVPoll]):
        def __setitem__(self, room: int, status: KVPoll) -> None:
            seen.append(view.holds(mark))
            super().__setitem__(room, status)

    manager.request_status = Statuses(manager.request_status)
    manager.update_status(ROOM, KVPoll.Failed)
    assert seen == [False]


def test_a_late_confirmation_of_a_failed_room_changes_nothing(prefill: tuple[Any, list[messages.Message]]) -> None:
    manager, sent = prefill
    lend_all(manager, sent)
    manager.update_status(ROOM, KVPoll.Failed)
    manager.handle(messages.Pulled(room=ROOM, session=SESSION))
    assert manager.request_status[ROOM] == KVPoll.Failed


def test_a_decode_worker_that_does_not_confirm_loses_its_loan(prefill: tuple[Any, list[messages.Message]]) -> None:
    manager, sent = prefill
    sender = object.__new__(prefill_end.PrefillShareKVSender)
    sender.kv_mgr, sender.bootstrap_room, sender.conclude_state = manager, ROOM, None
    sender.trace_ctx = type("Trace", (), {"trace_req_finish": lambda self: None})()
    manager._staging_outstanding = {}
    mark = lend_all(manager, sent)
    assert sender.poll() == KVPoll.Transferring
    time.sleep(0.06)
    assert sender.poll() == KVPoll.Failed
    assert not LeaseView(manager._lease_table.handle).holds(mark)
    assert "has not confirmed its copy of 4 pages" in manager.failure_records[ROOM]


def test_messages_for_the_other_end_are_refused(prefill: tuple[Any, list[messages.Message]]) -> None:
    manager, _ = prefill
    with pytest.raises(prefill_end.HandoffError, match="a Refused came to a prefill worker"):
        manager.handle(messages.Refused(bootstrap_addr="x", reason="y"))


# ---- decode -------------------------------------------------------------------------------------------------------


@pytest.fixture
def decode(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[messages.Message], LeaseTable]:
    """A decode manager with a pool of zeros, a mapped prefill pool of ones, and a room that claims pages 4..7."""
    manager, sent = bare(decode_end.DecodeKVManager, monkeypatch)
    table = LeaseTable.create()
    source = [torch.ones((8, 8), dtype=torch.uint8) for _ in range(2)]
    manager.buffers = [torch.zeros((8, 8), dtype=torch.uint8) for _ in range(2)]
    manager.pool = PoolView.of_tensors(manager.buffers)
    manager.metadata = [np.zeros((2, 8), dtype=np.uint8)]
    manager.session, manager.forward_stream = SESSION, None
    manager._lent_at_ns, manager._copy, manager.claims = {}, copy_pages, ClaimBook()
    pool = decode_end._PrefillPool(PoolView.of_tensors(source), LeaseView(table.handle), rank=0, heads=None)
    manager._pools = {1: pool}
    wanted = np.arange(4, 8, dtype=np.int32)
    prefill = {0: ("127.0.0.1", 1)}
    manager.want(ROOM, wanted, metadata_index=1, prefix_tokens=0, prefill=prefill, readers=1)
    return manager, sent, table


def pages(mark: LeaseMark, *, first: int = 0, count: int = PAGES, is_last: bool = True) -> messages.Pages:
    return messages.Pages(
        room=ROOM,
        pid=1,
        first=first,
        pages=np.arange(first, first + count, dtype="<i4").tobytes(),
        lease_slot=mark.slot,
        lease_number=mark.number,
        sent_ns=time.monotonic_ns(),
        metadata=(bytes(range(8)),) if is_last else None,
    )


def written(manager: Any) -> list[int]:
    return sorted({int(page) for buffer in manager.buffers for page in buffer.any(dim=1).nonzero()})


def test_a_copy_under_a_lease_is_confirmed(decode: tuple[Any, list[messages.Message], LeaseTable]) -> None:
    manager, sent, table = decode
    mark = table.grant()
    manager.handle(pages(mark, count=3, is_last=False))
    assert (manager.request_status[ROOM], sent) == (KVPoll.WaitingForInput, [])
    manager.handle(pages(mark, first=3, count=1))
    assert manager.request_status[ROOM] == KVPoll.Success
    assert sent == [messages.Pulled(room=ROOM, session=SESSION)]
    assert written(manager) == [4, 5, 6, 7] and manager.metadata[0][1].tolist() == list(range(8))
    assert 0 <= manager.take_handoff_s(ROOM) < 5 and manager.take_handoff_s(ROOM) is None


def test_a_copy_during_which_prefill_let_go_is_not_used(decode: tuple[Any, list[messages.Message], LeaseTable]) -> None:
    """Its source may have been another request's by then."""
    manager, sent, table = decode
    mark = table.grant()

    def copy_while_prefill_lets_go(*args: Any) -> None:
        copy_pages(*args)
        table.revoke(mark)

    manager._copy = copy_while_prefill_lets_go
    manager.handle(pages(mark))
    assert manager.request_status[ROOM] == KVPoll.Failed
    assert "while its pages were being copied" in manager.failure_records[ROOM]
    assert sent == []


def test_a_copy_that_breaks_down_fails_its_request(decode: tuple[Any, list[messages.Message], LeaseTable]) -> None:
    manager, sent, table = decode

    def broken(*_args: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    manager._copy = broken
    manager.handle(pages(table.grant()))
    assert manager.request_status[ROOM] == KVPoll.Failed
    assert manager.failure_records[ROOM] == "the copy failed: an illegal memory access was encountered"
    assert sent == []


def test_nothing_is_written_into_pages_that_were_given_back(
    decode: tuple[Any, list[messages.Message], LeaseTable],
) -> None:
    manager, sent, table = decode
    mark = table.grant()
    manager.release(ROOM)
    manager.handle(pages(mark))
    assert (written(manager), sent) == ([], [])


@pytest.mark.parametrize(
    ("offer", "reason"),
    [
        (lambda mark: pages(mark, first=1, count=3), "lends pages from 1 on, wanted from 0 on"),
        (lambda mark: pages(mark, count=3), "lent 3 pages, wanted 4"),
        (lambda mark: pages(mark, count=5), "5 source pages for 4 target pages"),
        (lambda mark: pages(LeaseMark(1 << 20, 5)), "a lease names word 1048576"),
        (lambda mark: messages.Pages(ROOM, 1, 0, b"12345", 0, 1, 0, None), "in 5 bytes, wanted 4 for each"),
        (lambda mark: messages.Pages(ROOM, 2, 0, b"", 0, 1, 0, None), "never introduced its pool"),
    ],
)
def test_an_offer_that_cannot_be_right_fails_the_request(
    decode: tuple[Any, list[messages.Message], LeaseTable],
    offer: Callable[[LeaseMark], messages.Pages],
    reason: str,
) -> None:
    manager, sent, table = decode
    manager.handle(offer(table.grant()))
    assert manager.request_status[ROOM] == KVPoll.Failed
    assert reason in manager.failure_records[ROOM]
    assert sent == []


def test_a_room_that_decode_gives_up_while_prefill_takes_it_up_fails_at_once(
    prefill: tuple[Any, list[messages.Message]],
) -> None:
    """The word comes after the room was opened, and before SGLang knows of it."""
    manager, _ = prefill
    manager.request_status.clear()
    manager.handle_frames([b"ABORT", str(ROOM).encode()])
    assert manager.leases.failure(ROOM) == prefill_end.GIVEN_UP_BY_DECODE
