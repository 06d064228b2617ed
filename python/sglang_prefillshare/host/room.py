"""A worker's room, from its scheduler to its HTTP process: some words of shared memory, written and never asked for.

The scheduler writes them where SGLang publishes its own load snapshot: after a prefill batch, every few decode steps,
and when it becomes idle. So they cost no message and no wait, and SGLang's choice of rank and pace holds for them: rank
0 writes. Each word is whole; two that are read at once need not be of one moment.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Final

import numpy as np

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.memory import RegionHandle, SharedRegion
from sglang_prefillshare.host.transfer import metrics as handoff_metrics
from sglang_prefillshare.protocol import Room

logger = logging.getLogger(__name__)

_NAMES: Final = tuple(field.name for field in dataclasses.fields(Room))
_WORD_BYTES: Final = 8
_ATTRIBUTE: Final = "_prefill_share_room"


class RoomWords:
    """The words of one worker: the scheduler's to write, the HTTP process's to read."""

    def __init__(self, region: SharedRegion) -> None:
        self._region = region
        self._words = region.array(np.int64)

    @classmethod
    def create(cls) -> RoomWords:
        """Raises `HandoffError` where there is no shared memory."""
        return cls(SharedRegion.create(len(_NAMES) * _WORD_BYTES, name="prefillshare-room"))

    @classmethod
    def attach(cls, handle: RegionHandle) -> RoomWords:
        """Raises `HandoffError` where the scheduler's memory cannot be seen."""
        return cls(SharedRegion.attach(handle))

    @property
    def handle(self) -> RegionHandle:
        return self._region.handle

    def write(self, room: Room) -> None:
        self._words[:] = dataclasses.astuple(room)

    def read(self) -> Room | None:
        """None before the first `write`."""
        values = dict(zip(_NAMES, self._words.tolist(), strict=True))
        return Room(**values) if values["pool_tokens"] else None


def offer_room(scheduler: Any) -> RegionHandle | None:
    """Give a scheduler that publishes its load its words; None on other ranks, and without shared memory."""
    if scheduler.load_snapshot_writer is None:
        return None
    try:
        words = RoomWords.create()
    except HandoffError as error:
        logger.warning("Routers cannot know this worker's room, and hold no requests back for it: %s", error)
        return None
    setattr(scheduler, _ATTRIBUTE, words)
    words.write(_room_of(scheduler))
    return words.handle


def find_room(handle: RegionHandle | None) -> RoomWords | None:
    """The HTTP process's end of `offer_room`."""
    if handle is None:
        return None
    try:
        return RoomWords.attach(handle)
    except HandoffError as error:
        logger.warning("Routers cannot know this worker's room, and hold no requests back for it: %s", error)
        return None


def publish_load_snapshot(result: Any, self: Any, force: bool = False) -> None:
    """Hook on the scheduler, after it published its load: write its room as well."""
    words = getattr(self, _ATTRIBUTE, None)
    if words is not None and result is not None:
        words.write(_room_of(self))


def _room_of(scheduler: Any) -> Room:
    pool = scheduler.pool_stats_observer.get_pool_stats()
    running, waiting = len(scheduler.running_batch.reqs), len(scheduler.waiting_queue)
    reserved = 0
    if scheduler.disaggregation_mode.value == "prefill":
        waiting += len(scheduler.disagg_prefill_bootstrap_queue.queue)
        running += len(scheduler.disagg_prefill_inflight_queue)
    elif scheduler.disaggregation_mode.value == "decode":
        queue = scheduler.disagg_decode_prealloc_queue
        waiting += len(queue.queue) + len(queue.retracted_queue) + len(scheduler.disagg_decode_transfer_queue.queue)
        reserved = queue.num_reserved_decode_tokens
    return Room(
        pool_tokens=scheduler.max_total_num_tokens,
        used_tokens=max(0, pool.full_num_used),
        evictable_tokens=pool.full_evictable_size,
        leased_tokens=handoff_metrics.leased_pages() * scheduler.page_size,
        running_requests=running,
        waiting_requests=waiting,
        reserved_tokens=reserved,
    )
