"""What a scheduler writes of its room is what the worker's HTTP process reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sglang_prefillshare.host import room as rooms
from sglang_prefillshare.host.transfer import metrics
from sglang_prefillshare.protocol import Room


def scheduler(mode: str, **changes: Any) -> Any:
    """As much of SGLang's as is read: a pool of 1,000 tokens, of which 300 are held and 200 could be evicted."""
    stats = SimpleNamespace(full_num_used=300, full_evictable_size=200)
    values = {
        "load_snapshot_writer": object(),
        "pool_stats_observer": SimpleNamespace(get_pool_stats=lambda: stats),
        "running_batch": SimpleNamespace(reqs=[1, 2]),
        "waiting_queue": [1],
        "disaggregation_mode": SimpleNamespace(value=mode),
        "disagg_prefill_bootstrap_queue": SimpleNamespace(queue=[1, 2, 3]),
        "disagg_prefill_inflight_queue": [1],
        "disagg_decode_prealloc_queue": SimpleNamespace(queue=[1], retracted_queue=[1], num_reserved_decode_tokens=512),
        "disagg_decode_transfer_queue": SimpleNamespace(queue=[1, 2]),
        "max_total_num_tokens": 1000,
        "page_size": 16,
    }
    return SimpleNamespace(**(values | changes))


def read(handle: Any) -> Room | None:
    words = rooms.find_room(handle)
    assert words is not None
    return words.read()


def test_decode_tells_what_it_reserves_and_prefill_what_it_lends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_leased_pages", {"prefill": 2})
    common = {"pool_tokens": 1000, "used_tokens": 300, "evictable_tokens": 200, "leased_tokens": 32}
    assert read(rooms.offer_room(scheduler("prefill"))) == Room(**common, running_requests=3, waiting_requests=4)
    assert read(rooms.offer_room(scheduler("decode"))) == Room(
        **common, running_requests=2, waiting_requests=5, reserved_tokens=512
    )
    assert read(rooms.offer_room(scheduler("null"))) == Room(**common, running_requests=2, waiting_requests=1)


def test_it_is_written_again_when_the_load_is_published_and_only_then() -> None:
    one = scheduler("null")
    handle = rooms.offer_room(one)
    one.waiting_queue = []
    rooms.publish_load_snapshot(None, one)  # SGLang held this one back
    assert read(handle).waiting_requests == 1
    rooms.publish_load_snapshot(object(), one, force=True)
    assert read(handle).waiting_requests == 0


def test_other_ranks_offer_nothing_and_publish_without_words() -> None:
    other = scheduler("null", load_snapshot_writer=None)
    assert rooms.offer_room(other) is None
    rooms.publish_load_snapshot(object(), other)
    assert rooms.find_room(None) is None


def test_words_that_were_never_written_say_nothing() -> None:
    assert rooms.RoomWords.create().read() is None
