"""What a worker says of itself, as the router reads it."""

import dataclasses

import pytest

from sglang_prefillshare.errors import WorkerError
from sglang_prefillshare.protocol import BOUNDARY_RULE, EventStream, Role, Room, WorkerInfo

INFO = WorkerInfo(
    role=Role.DECODE, model="planner", base_fingerprint="b", boundary=BOUNDARY_RULE, trained=True,
    transfer_backend="nixl", page_size=1, kv_dtype="bfloat16", max_total_tokens=100, max_running_requests=4,
    context_length=50, bootstrap_port=None, version="0",
)  # fmt: skip


def test_room_comes_back_as_it_went_and_changes_no_identity():
    told = dataclasses.replace(INFO, room=Room(pool_tokens=100, used_tokens=7, waiting_requests=2))
    read = WorkerInfo.from_json(told.to_json(), source="w")
    assert read.room == Room(pool_tokens=100, used_tokens=7, waiting_requests=2)
    assert read == INFO  # a worker that fills up is not another worker: its KV is still there


def test_a_worker_need_not_say_anything_and_may_say_more():
    plain = {name: value for name, value in INFO.to_json().items() if name != "room"}
    assert WorkerInfo.from_json(plain, source="w").room is None
    later = plain | {"room": {"pool_tokens": 5, "used_tokens": 0, "of_a_later_version": "x"}}
    assert WorkerInfo.from_json(later, source="w").room == Room(pool_tokens=5, used_tokens=0)


@pytest.mark.parametrize(
    "room",
    [
        *([], 7, {}, {"pool_tokens": 5}, {"pool_tokens": "5", "used_tokens": 0}),
        *({"pool_tokens": 5, "used_tokens": True}, {"pool_tokens": -1, "used_tokens": 0}),
        {"pool_tokens": 2**63, "used_tokens": 0},
    ],
)
def test_what_is_no_room_is_refused(room):
    with pytest.raises(WorkerError, match="w says that its"):
        WorkerInfo.from_json(INFO.to_json() | {"room": room}, source="w")


@pytest.mark.parametrize("page_size", [0, -1, "16", None, True])
def test_what_is_no_page_size_is_refused(page_size):
    with pytest.raises(WorkerError, match="w has pages of"):
        WorkerInfo.from_json(INFO.to_json() | {"page_size": page_size}, source="w")


def test_an_event_stream_comes_back_as_it_went():
    told = dataclasses.replace(INFO, events=EventStream(port=5557, replay_port=5558, topic="t"))
    read = WorkerInfo.from_json(told.to_json(), source="w")
    assert read.events == told.events and read != INFO, "another publisher is another process"


@pytest.mark.parametrize(
    "events",
    [
        *([], 7, {}, {"port": 5}, {"port": "5", "replay_port": 6}, {"port": True, "replay_port": 6}),
        *({"port": 5, "replay_port": 0}, {"port": 65536, "replay_port": 6}),
        {"port": 5, "replay_port": 6, "topic": 3},
    ],
)
def test_what_is_no_event_stream_is_refused(events):
    with pytest.raises(WorkerError, match="w says that its event stream"):
        WorkerInfo.from_json(INFO.to_json() | {"events": events}, source="w")
