"""The `prefillshare` transfer backend: decode reads the pages that it lacks straight from prefill's KV pool.

A pull, not a push. Prefill lends pages: it says which of its pages hold a request's KV and keeps them as they are.
Decode copies them into pages of its own, looks whether the loan still held, and confirms. Nothing is staged and nobody
else writes into decode's pool, so a decode worker that gives a request's pages back can be sure that nothing arrives in
them later.

SGLang's `Common*` classes keep the bootstrap, the rooms and the failure records. `handoff/lease.py` has the rules of
lending and claiming. This module has what both ends share: the control socket, and the watch over the peers' lives,
through their pidfds. `prefill_end.py` and `decode_end.py` are the two ends, `backend.py` tells SGLang of them.
"""

from __future__ import annotations

import ctypes
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import zmq
from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVBootstrapServer, CommonKVManager
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import cuda_memory, messages
from sglang_prefillshare.handoff.geometry import KVGeometry
from sglang_prefillshare.handoff.memory import memory_space, watch_process
from sglang_prefillshare.handoff.pool import PoolView
from sglang_prefillshare.handoff.ranks import Rank
from sglang_prefillshare.host.transfer import wakeup
from sglang_prefillshare.host.transfer.pool_device import pool_device, pool_heads

logger = logging.getLogger(__name__)

NO_REASON = "SGLang gave the handoff up and did not say why"
STATUS_TAG = b"STATUS"
ABORT_TAG = b"ABORT"


@dataclass(slots=True)
class _Watched:
    """A peer process whose end we notice: its pidfd, and the names it is known by."""

    pid: int
    fd: int
    names: set[str] = field(default_factory=set)


class PrefillShareKVManager(CommonKVManager):
    """What both ends share. A subclass handles messages, SGLang's own control frames, and the death of a peer."""

    kv_status_msg_tag: ClassVar[bytes] = STATUS_TAG
    kv_status_msg_carries_reason: ClassVar[bool] = True

    def __init__(
        self, args: KVArgs, disaggregation_mode: DisaggregationMode, server_args: Any, is_mla_backend: bool = False
    ) -> None:
        if is_mla_backend or list(args.state_types or ()):
            raise HandoffError(
                "the prefillshare backend hands over multi-head and grouped-query attention caches only. "
                "Choose --disaggregation-transfer-backend nixl."
            )
        self.fingerprint = str(args.kv_layout or "")
        self.device = pool_device()
        """Where the pool is."""
        heads, total_heads = pool_heads()
        self.geometry = KVGeometry(
            page_size=args.page_size,
            kv_dtype=str(args.kv_cache_dtype_str),
            page_bytes=tuple(args.kv_item_lens),
            heads=heads,
            total_heads=total_heads,
        )
        self.pool = PoolView.at(
            args.kv_data_ptrs, args.kv_item_lens, args.kv_data_lens[0] // args.kv_item_lens[0], owner=None
        )
        self._watched: dict[int, _Watched] = {}
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self.enable_staging = False
        self.rank = Rank(self.attn_tp_rank, self.attn_tp_size)
        self.metadata = [
            _bytes_at(pointer, length).reshape(length // row, row)
            for pointer, length, row in zip(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens, strict=True)
        ]

    @property
    def on_cuda(self) -> bool:
        return bool(self.device.type == "cuda")

    @property
    def cuda_index(self) -> int | None:
        """The pool's GPU as this process numbers it; None for a pool in host memory."""
        return int(self.device.index) if self.on_cuda else None

    def with_device(self) -> AbstractContextManager[None]:
        """What a thread of ours that has to do with the GPU runs in: a new thread is on no GPU, or on GPU 0."""
        return cuda_memory.on_device(self.device.index) if self.on_cuda else nullcontext()

    # ---- for the ends to fill in -----------------------------------------------------------------------------------

    def handle(self, message: messages.Message) -> None:
        """Act on a message of the peer; `HandoffError` drops it with a warning."""
        raise NotImplementedError

    def handle_frames(self, frames: list[bytes]) -> None:
        """Act on one of SGLang's own control messages."""
        raise NotImplementedError

    def peer_died(self, pid: int, names: set[str]) -> None:
        """Give up everything that waits for a process that is no more."""
        raise NotImplementedError

    def place(self) -> dict[str, Any]:
        """Where the pool is, as `WorkerInfo` tells others: `pool_space`, `gpu`, `gpus_in_reach`."""
        if self.cuda_index is None:
            return {"pool_space": memory_space("pid")}
        return {
            "pool_space": memory_space("pid", "ipc"),
            "gpu": cuda_memory.device_uuid(self.cuda_index),
            "gpus_in_reach": cuda_memory.reachable_gpus(self.cuda_index),
        }

    def prove(self) -> None:
        """Hand a page over with a process of its own, through this end's half of the path that peers use.

        Raises `HandoffError` if this worker could hand nothing over, `UntriedError` if it could not be found out.
        """
        raise NotImplementedError

    # ---- shared ----------------------------------------------------------------------------------------------------

    def update_status(self, bootstrap_room: int, status: KVPoll) -> None:
        super().update_status(bootstrap_room, status)
        wakeup.wake()

    def fail_room(self, room: int, reason: str) -> None:
        """Fail a room of SGLang's that has not ended; of any other, say nothing: nobody would ever ask."""
        if self.request_status.get(room) in (None, KVPoll.Failed, KVPoll.Success):
            return
        self.record_failure(room, reason)
        self.update_status(room, KVPoll.Failed)
        if room not in self.request_status:  # the scheduler has closed it in the meantime
            with self.failure_lock:
                self.failure_records.pop(room, None)

    def explain(self, room: int) -> None:
        """See to it that a failed room has a reason: SGLang would name another rank, which there is none of."""
        with self.failure_lock:
            self.failure_records.setdefault(room, NO_REASON)

    def send(self, host: str, port: int, message: messages.Message) -> None:
        address = NetworkAddress(host, port)
        self._send_multipart_locked(address.to_tcp(), messages.encode(message), is_ipv6=address.is_ipv6)

    def watch(self, pid: int, started: int, name: str) -> None:
        """Notice the end of a peer; `name` is what it is known by (a session, a bootstrap address)."""
        for watched in self._watched.values():
            if watched.pid == pid:
                watched.names.add(name)
                return
        fd = watch_process(pid, started)
        self._watched[fd] = _Watched(pid=pid, fd=fd, names={name})

    def control_loop(self) -> None:
        """The one thread that hears from peers: messages, and deaths."""
        with self.with_device():
            self._hear()

    def _hear(self) -> None:
        poller = zmq.Poller()
        poller.register(self.server_socket, zmq.POLLIN)
        while True:
            for ready, _ in poller.poll():
                if ready is self.server_socket:
                    known = set(self._watched)
                    self._receive()
                    for fd in set(self._watched) - known:
                        poller.register(fd, zmq.POLLIN)
                else:
                    poller.unregister(ready)
                    watched = self._watched.pop(ready)
                    os.close(watched.fd)
                    self.peer_died(watched.pid, watched.names)
                    wakeup.wake()

    def _receive(self) -> None:
        frames = self.server_socket.recv_multipart()
        try:
            message = messages.decode(frames)
            if message is not None:
                self.handle(message)
            else:
                self.handle_frames(frames)
        except HandoffError as error:
            logger.warning("Dropping a handoff control message: %s", error)
        except Exception:
            logger.exception("A handoff control message could not be handled")


class PrefillShareKVBootstrapServer(CommonKVBootstrapServer):
    """SGLang's bootstrap server, unchanged."""


def _bytes_at(pointer: int, length: int) -> npt.NDArray[np.uint8]:
    """`length` bytes of this process's memory at `pointer`; the buffer that is there outlives the view."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(pointer))
