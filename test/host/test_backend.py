"""The one promise of the backend that no request shows: a copy counts only if prefill still owned what was copied."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.disaggregation.base.conn import KVPoll  # noqa: E402 - after SGLang's plugins, as in a server

from sglang_prefillshare.handoff import messages  # noqa: E402
from sglang_prefillshare.host import backend  # noqa: E402

ROOM, SESSION = 7, "decode"


def prefill_manager(status: KVPoll) -> tuple[backend.PrefillShareKVManager, list[messages.Message]]:
    """A prefill worker's manager with one room in `status`; what it sends is recorded instead."""
    manager = object.__new__(backend.PrefillShareKVManager)
    sent: list[messages.Message] = []
    manager.request_status = {ROOM: status}
    manager.deferred_bootstrap = None
    manager._decode_peers = {SESSION: backend._DecodePeer("127.0.0.1", 1)}

    def send(_host: str, _port: int, message: messages.Message) -> None:
        sent.append(message)

    manager._send = send  # type: ignore[method-assign]
    return manager, sent


def test_a_copy_of_a_live_room_is_sealed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the scheduler is so quick that it has closed the room before the control thread goes on."""
    manager, sent = prefill_manager(KVPoll.Transferring)
    closed: list[KVPoll] = []
    monkeypatch.setattr(backend.wakeup, "wake", lambda: closed.append(manager.request_status.pop(ROOM)))
    manager._serve_decode(messages.Pulled(room=ROOM, session=SESSION))
    assert sent == [messages.Sealed(room=ROOM)]
    assert closed == [KVPoll.Success]


@pytest.mark.parametrize("status", [KVPoll.Failed, None])
def test_a_copy_of_a_room_that_failed_or_is_gone_is_never_sealed(status: Any) -> None:
    """Its pages may belong to another request already."""
    manager, sent = prefill_manager(status)
    if status is None:
        manager.request_status.clear()
    manager._serve_decode(messages.Pulled(room=ROOM, session=SESSION))
    assert sent == []
    assert manager.request_status.get(ROOM) in (None, KVPoll.Failed)
