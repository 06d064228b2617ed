"""The `prefillshare` transfer backend: decode reads the pages it needs straight from prefill's KV pool.

A pull, not a push. Prefill says which of its pages hold a request's KV; decode copies them into pages of its own and
says when it is done; until then prefill keeps them locked. Nothing is staged and nobody else writes into decode's pool,
so a decode worker that gives a request's pages back can be sure that nothing arrives in them later.

SGLang's `Common*` classes keep the bootstrap, the rooms and the failure records. This module adds the control messages
(`handoff/messages.py`), the mapping of the peer's pool, the copy, and the watch over the peer's life: a process that
dies is noticed at once, through its pidfd.
"""

from __future__ import annotations

import collections
import ctypes
import logging
import os
import threading
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq
from sglang.srt.disaggregation.base.conn import KVArgs, KVPoll
from sglang.srt.disaggregation.common.conn import (
    AbortNotification,
    CommonKVBootstrapServer,
    CommonKVManager,
    CommonKVReceiver,
    CommonKVSender,
)
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.utils.network import NetworkAddress

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import messages
from sglang_prefillshare.handoff.copy import PageList, check_pages, copy_pages
from sglang_prefillshare.handoff.geometry import KVGeometry
from sglang_prefillshare.handoff.memory import RegionHandle, SharedRegion, process_start
from sglang_prefillshare.host import wakeup

logger = logging.getLogger(__name__)

_ABORT_TAG = b"ABORT"
_STATUS_TAG = b"STATUS"
_REMEMBERED_ROOMS = 4096
"""How many failed rooms a prefill worker can still name when decode asks for them too late."""


@dataclass(slots=True)
class _DecodePeer:
    """A decode process that registered with this prefill worker."""

    host: str
    port: int


@dataclass(slots=True)
class _WantedRoom:
    """One decode process's side of a room, in the form that SGLang's status messages look it up."""

    endpoint: str
    dst_port: int
    page_count: int
    required_dst_info_num: int = 1
    is_dummy: bool = False


@dataclass(slots=True)
class _PrefillPool:
    """A prefill worker's KV pool as mapped into this decode process."""

    region: SharedRegion
    buffers: list[Any]
    page_count: int


@dataclass(slots=True)
class _Destination:
    """Where a room's KV goes: pages of this decode worker, which are its own until the room is forgotten."""

    pages: PageList
    metadata_index: int
    prefill: tuple[str, int]


@dataclass(slots=True)
class _Watched:
    """A peer process whose end we notice: its pidfd and what to do."""

    pid: int
    fd: int
    names: set[str] = field(default_factory=set)


class _RecentRooms:
    """Why rooms ended, for the last few thousand of them."""

    def __init__(self) -> None:
        self._reasons: collections.OrderedDict[int, str] = collections.OrderedDict()

    def add(self, room: int, reason: str) -> None:
        self._reasons[room] = reason
        while len(self._reasons) > _REMEMBERED_ROOMS:
            self._reasons.popitem(last=False)

    def pop(self, room: int) -> str | None:
        return self._reasons.pop(room, None)


class PrefillShareKVManager(CommonKVManager):
    """Both sides of the backend; which one is decided by the worker's disaggregation mode."""

    kv_status_msg_tag = _STATUS_TAG
    kv_status_msg_carries_reason = True

    def __init__(
        self, args: KVArgs, disaggregation_mode: DisaggregationMode, server_args: Any, is_mla_backend: bool = False
    ) -> None:
        self._fingerprint = str(args.kv_layout or "")
        self._refuse_unsupported(args, is_mla_backend)
        self.geometry = KVGeometry(
            page_size=args.page_size, kv_dtype=str(args.kv_cache_dtype_str), page_bytes=tuple(args.kv_item_lens)
        )
        # Registering with the bootstrap server, in the base class, lets peers in: be ready for them before.
        self._pool_lock = threading.Lock()
        self._watched: dict[int, _Watched] = {}
        self._decode_peers: dict[str, _DecodePeer] = {}
        self._prefill_pools: dict[int, _PrefillPool] = {}
        self._destinations: dict[int, _Destination] = {}
        self._open_rooms: set[int] = set()
        self._ended_rooms = _RecentRooms()  # failed on this side; decode may still ask
        self._abandoned_rooms = _RecentRooms()  # given up by decode before prefill heard of them
        self.session = uuid.uuid4().hex
        super().__init__(args, disaggregation_mode, server_args, is_mla_backend)
        self.enable_staging = False
        self._buffers = [
            _bytes_at(pointer, length).view(length // page_bytes, page_bytes)
            for pointer, length, page_bytes in zip(args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens, strict=True)
        ]
        self._metadata = [
            _bytes_at(pointer, length).view(length // row, row)
            for pointer, length, row in zip(args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens, strict=True)
        ]
        is_prefill = disaggregation_mode == DisaggregationMode.PREFILL
        self._handle = self._serve_decode if is_prefill else self._serve_prefill
        threading.Thread(target=self._control_loop, name="prefillshare-control", daemon=True).start()
        if not is_prefill:
            self._start_heartbeat_checker_thread()

    def _refuse_unsupported(self, args: KVArgs, is_mla_backend: bool) -> None:
        if is_mla_backend or list(args.state_types or ()):
            raise HandoffError(
                "the prefillshare backend hands over multi-head and grouped-query attention caches only. "
                "Choose --disaggregation-transfer-backend nixl."
            )

    # ---- both sides ------------------------------------------------------------------------------------------------

    def update_status(self, bootstrap_room: int, status: KVPoll) -> None:
        super().update_status(bootstrap_room, status)
        wakeup.wake()

    def _control_loop(self) -> None:
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
                    self._peer_died(self._watched.pop(ready))

    def _receive(self) -> None:
        frames = self.server_socket.recv_multipart()
        try:
            message = messages.decode(frames)
            if message is not None:
                self._handle(message)
            elif frames and frames[0] == _ABORT_TAG:
                self._aborted_by_decode(frames)
            else:
                self._status_from_prefill(frames)
        except HandoffError as error:
            logger.warning("Dropping a handoff control message: %s", error)
        except Exception:
            logger.exception("A handoff control message could not be handled")

    def _send(self, host: str, port: int, message: messages.Message) -> None:
        address = NetworkAddress(host, port)
        self._send_multipart_locked(address.to_tcp(), messages.encode(message), is_ipv6=address.is_ipv6)

    def _watch(self, pid: int, started: int, name: str) -> None:
        """Notice the end of a peer; `name` is what it is known by (a session, a bootstrap address)."""
        for watched in self._watched.values():
            if watched.pid == pid:
                watched.names.add(name)
                return
        try:
            if process_start(pid) != started:
                raise ProcessLookupError(pid)
            fd = os.pidfd_open(pid)
        except OSError as error:
            raise HandoffError(
                f"process {pid} of the peer cannot be seen from here ({error.strerror or 'it is gone'}). The "
                "prefillshare backend needs both workers on one host and in one PID namespace; choose nixl otherwise."
            ) from error
        self._watched[fd] = _Watched(pid=pid, fd=fd, names={name})

    def _peer_died(self, watched: _Watched) -> None:
        os.close(watched.fd)
        if self.disaggregation_mode == DisaggregationMode.PREFILL:
            for session in watched.names:
                self._decode_died(session)
        else:
            with self._pool_lock:
                self._prefill_pools.pop(watched.pid, None)
            for bootstrap_addr in watched.names:
                self._handle_node_failure(bootstrap_addr)
        wakeup.wake()

    # ---- prefill side ----------------------------------------------------------------------------------------------

    def _serve_decode(self, message: messages.Message) -> None:
        if isinstance(message, messages.Register):
            self._register(message)
        elif isinstance(message, messages.Want):
            self._want(message)
        elif isinstance(message, messages.Pulled):
            self._seal(message)

    def _register(self, message: messages.Register) -> None:
        try:
            if message.fingerprint != self._fingerprint:
                raise HandoffError(
                    f"this prefill worker serves base {self._fingerprint}, the decode module was fine-tuned on "
                    f"{message.fingerprint}. Point it at a prefill worker of its own base."
                )
            self.geometry.check_same(message.geometry, mine="this prefill worker", theirs="the decode worker")
            self._watch(message.pid, message.started, message.session)
            answer: messages.Message = self._offer(message.bootstrap_addr)
            self._decode_peers[message.session] = _DecodePeer(message.host, message.port)
        except HandoffError as error:
            logger.error("Refusing decode worker %s:%s: %s", message.host, message.port, error)
            answer = messages.Refused(bootstrap_addr=message.bootstrap_addr, reason=str(error))
        self._send(message.host, message.port, answer)

    def _offer(self, bootstrap_addr: str) -> messages.Pool:
        found = [SharedRegion.owning(pointer) for pointer in self.kv_args.kv_data_ptrs]
        if any(place is None for place in found):
            raise HandoffError(
                "the KV pool of this prefill worker is not in shared memory. The prefillshare backend needs the CPU "
                "platform; choose --disaggregation-transfer-backend nixl."
            )
        places = [place for place in found if place is not None]
        handle = places[0][0].handle
        return messages.Pool(
            bootstrap_addr=bootstrap_addr,
            pid=handle.pid,
            started=handle.started,
            fd=handle.fd,
            region_bytes=handle.size,
            page_count=self._buffers[0].shape[0],
            offsets=tuple(offset for _, offset in places),
            geometry=self.geometry,
        )

    def _want(self, message: messages.Want) -> None:
        peer = self._decode_peers.get(message.session)
        if peer is None:
            logger.warning("Room %s is wanted by an unregistered decode worker", message.room)
            return
        if (failure := self._ended_rooms.pop(message.room)) is not None:
            self.send_kv_status_message(
                targets=[(peer.host, peer.port)],
                bootstrap_room=message.room,
                status=KVPoll.Failed,
                failure_reason=failure,
            )
            return
        self.transfer_infos[message.room] = {
            message.session: _WantedRoom(endpoint=peer.host, dst_port=peer.port, page_count=message.page_count)
        }
        self.req_to_decode_prefix_len[message.room] = message.prefix_tokens
        self.update_status(message.room, KVPoll.WaitingForInput)

    def _seal(self, message: messages.Pulled) -> None:
        """Tell decode that its copy is good, unless the room failed first: a failed room's pages may be reused."""
        peer = self._decode_peers.get(message.session)
        is_alive = self.request_status.get(message.room) not in (None, KVPoll.Failed)
        if peer is not None and is_alive:
            self._send(peer.host, peer.port, messages.Sealed(room=message.room))
        # Last: the scheduler wakes up, releases the pages and closes the room.
        self.update_status(message.room, KVPoll.Success)

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: PageList,
        index_slice: slice,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        **_ignored: Any,
    ) -> None:
        """Tell decode that pages [index_slice) of its room now lie in `kv_indices` of our pool."""
        if self.request_status.get(bootstrap_room) in (None, KVPoll.Failed):
            return
        metadata = None
        if is_last_chunk:
            assert aux_index is not None
            metadata = tuple(buffer[aux_index].numpy().tobytes() for buffer in self._metadata)
        self.update_status(bootstrap_room, KVPoll.Transferring)
        for wanted in list(self.transfer_infos.get(bootstrap_room, {}).values()):
            try:
                self._check_room(bootstrap_room, wanted, index_slice, is_last_chunk)
                self._send(
                    wanted.endpoint,
                    wanted.dst_port,
                    messages.Pages(
                        room=bootstrap_room,
                        pid=os.getpid(),
                        first=index_slice.start,
                        pages=np.ascontiguousarray(kv_indices, dtype="<i4").tobytes(),
                        metadata=metadata,
                    ),
                )
            except (HandoffError, zmq.ZMQError) as error:
                self.conclude_failure(bootstrap_room=bootstrap_room, failure_reason=str(error))

    def _check_room(self, room: int, wanted: _WantedRoom, index_slice: slice, is_last_chunk: bool) -> None:
        if index_slice.stop > wanted.page_count or (is_last_chunk and index_slice.stop != wanted.page_count):
            raise HandoffError(
                f"room {room}: prefill holds {index_slice.stop} pages of the prompt, decode made room for "
                f"{wanted.page_count}. The two sides tokenized the prompt differently."
            )

    def _aborted_by_decode(self, frames: list[bytes]) -> None:
        notification = AbortNotification.from_zmq(frames)
        if notification is None:
            return
        if notification.room not in self._open_rooms:
            # Wanted by decode, never sent to this prefill worker: nobody else will clean up.
            self.transfer_infos.pop(notification.room, None)
            self.req_to_decode_prefix_len.pop(notification.room, None)
            self.request_status.pop(notification.room, None)
            self._abandoned_rooms.add(notification.room, "decode gave the request up")
        elif self.request_status.get(notification.room) not in (None, KVPoll.Success):
            self.record_failure(notification.room, "decode gave the request up")
            self.update_status(notification.room, KVPoll.Failed)

    def open_room(self, room: int) -> str | None:
        """Take up a room; returns why it is over already, if decode gave it up before."""
        self._open_rooms.add(room)
        self._ended_rooms.pop(room)
        return self._abandoned_rooms.pop(room)

    def close_room(self, room: int, failure: str | None) -> None:
        """Leave a room; if it failed, a decode worker that asks for it later is told so at once."""
        self._open_rooms.discard(room)
        if failure is not None:
            self._ended_rooms.add(room, failure)

    def _decode_died(self, session: str) -> None:
        self._decode_peers.pop(session, None)
        for room, infos in list(self.transfer_infos.items()):
            if session in infos and self.request_status.get(room) not in (None, KVPoll.Success):
                self.record_failure(room, "the decode worker died")
                self.update_status(room, KVPoll.Failed)

    # ---- decode side -----------------------------------------------------------------------------------------------

    def registration(self, bootstrap_addr: str) -> list[bytes]:
        """The frames with which this decode worker introduces itself to a prefill worker."""
        return messages.encode(
            messages.Register(
                session=self.session,
                host=self.local_ip,
                port=self.rank_port,
                pid=os.getpid(),
                started=process_start(os.getpid()),
                bootstrap_addr=bootstrap_addr,
                fingerprint=self._fingerprint,
                geometry=self.geometry,
            )
        )

    def want(
        self, room: int, pages: PageList, *, metadata_index: int, prefix_tokens: int, prefill: tuple[str, int]
    ) -> list[bytes]:
        """Remember where a room's KV goes and return the frames that ask for it."""
        with self._pool_lock:
            self._destinations[room] = _Destination(pages.astype(np.int32), metadata_index, prefill)
        return messages.encode(
            messages.Want(room=room, session=self.session, page_count=len(pages), prefix_tokens=prefix_tokens)
        )

    def forget(self, room: int) -> None:
        """Give a room's pages back: after this returns, nothing is written into them on its behalf."""
        with self._pool_lock:
            self._destinations.pop(room, None)

    def _serve_prefill(self, message: messages.Message) -> None:
        if isinstance(message, messages.Pages):
            self._pull(message)
        elif isinstance(message, messages.Sealed):
            self.update_status(message.room, KVPoll.Success)
        elif isinstance(message, messages.Pool):
            try:
                self._attach(message)
            except (HandoffError, ValueError) as error:  # ValueError: offsets or counts that do not fit the region
                self._refuse(message.bootstrap_addr, str(error))
        elif isinstance(message, messages.Refused):
            self._refuse(message.bootstrap_addr, message.reason)

    def _attach(self, message: messages.Pool) -> None:
        self.geometry.check_same(message.geometry, mine="this decode worker", theirs="the prefill worker")
        handle = RegionHandle(pid=message.pid, started=message.started, fd=message.fd, size=message.region_bytes)
        self._watch(message.pid, message.started, message.bootstrap_addr)
        import torch

        region = SharedRegion.attach(handle)
        buffers = [
            region.tensor(offset, (message.page_count, page_bytes), torch.uint8)
            for offset, page_bytes in zip(message.offsets, message.geometry.page_bytes, strict=True)
        ]
        with self._pool_lock:
            self._prefill_pools[message.pid] = _PrefillPool(region, buffers, message.page_count)

    def _refuse(self, bootstrap_addr: str, reason: str) -> None:
        """Fail every request that waits for this prefill worker, and forget it, so that the next one asks anew."""
        logger.error("Handshake with prefill worker %s refused: %s", bootstrap_addr, reason)
        with self.connection_lock:
            for key in [key for key in self.connection_pool if key.startswith(f"{bootstrap_addr}_")]:
                del self.connection_pool[key]
            self.prefill_info_table.pop(bootstrap_addr, None)
            rooms = list(self.addr_to_rooms_tracker.get(bootstrap_addr, ()))
        for room in rooms:
            if self.request_status.get(room) not in (None, KVPoll.Success):
                self.record_failure(room, reason)
                self.update_status(room, KVPoll.Failed)

    def _pull(self, message: messages.Pages) -> None:
        source_pages = np.frombuffer(message.pages, dtype="<i4")
        with self._pool_lock:
            destination = self._destinations.get(message.room)
            pool = self._prefill_pools.get(message.pid)
            if destination is None:
                return  # given up meanwhile; prefill has been told
            try:
                if pool is None:
                    raise HandoffError(f"process {message.pid} offers pages of a pool that it never introduced.")
                target_pages = destination.pages[message.first : message.first + len(source_pages)]
                check_pages(source_pages, pool.page_count, whose="the prefill worker")
                copy_pages(pool.buffers, self._buffers, source_pages, target_pages)
                if message.metadata is not None:
                    self._write_metadata(destination.metadata_index, message.metadata)
            except HandoffError as error:
                self.record_failure(message.room, str(error))
                self.update_status(message.room, KVPoll.Failed)
                return
        if message.metadata is not None:
            self._send(*destination.prefill, messages.Pulled(room=message.room, session=self.session))

    def _write_metadata(self, index: int, rows: tuple[bytes, ...]) -> None:
        import torch

        if [len(row) for row in rows] != [buffer.shape[1] for buffer in self._metadata]:
            raise HandoffError(
                "prefill and decode keep different request metadata. Start both with the same SGLang version and "
                "the same --disaggregation-enable-kv-checksum and SGLANG_ENABLE_DISAGG_SAMPLING_MASK."
            )
        for buffer, row in zip(self._metadata, rows, strict=True):
            buffer[index].copy_(torch.frombuffer(bytearray(row), dtype=torch.uint8))

    def _status_from_prefill(self, frames: list[bytes]) -> None:
        parsed = self.parse_kv_status_message(frames)
        if parsed is not None:
            room, status, rank, reason = parsed
            self.apply_prefill_status(bootstrap_room=room, status=status, prefill_rank=rank, failure_reason=reason)


class PrefillShareKVSender(CommonKVSender):
    """Prefill's end of one request: SGLang's, over the manager above, and telling decode when it is given up."""

    kv_mgr: PrefillShareKVManager

    def __init__(self, mgr: PrefillShareKVManager, bootstrap_addr: str, bootstrap_room: int, **kwargs: Any) -> None:
        abandoned = mgr.open_room(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room, **kwargs)
        if abandoned is not None:
            mgr.record_failure(bootstrap_room, abandoned)
            mgr.update_status(bootstrap_room, KVPoll.Failed)

    def abort(self) -> None:
        self.kv_mgr.conclude_failure(bootstrap_room=self.bootstrap_room, failure_reason="prefill gave the request up")
        super().abort()

    def clear(self) -> None:
        super().clear()
        failed = self.conclude_state != KVPoll.Success
        self.kv_mgr.close_room(self.bootstrap_room, "prefill gave the request up" if failed else None)


class PrefillShareKVReceiver(CommonKVReceiver):
    """Decode's end of one request."""

    kv_mgr: PrefillShareKVManager

    def _register_kv_args(self) -> bool:
        if not self.bootstrap_infos:
            return self.bootstrap_infos is not None
        frames = self.kv_mgr.registration(self.bootstrap_addr)
        return all(
            self._send_bootstrap_message(bootstrap_info=info, message=frames, operation="_register_kv_args")
            for info in self.bootstrap_infos
        )

    def send_metadata(
        self,
        kv_indices: PageList,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        decode_prefix_len: int | None = None,
        **_device_only: Any,
    ) -> None:
        if self.bootstrap_infos is None:
            self.kv_mgr.record_failure(self.bootstrap_room, f"prefill worker {self.bootstrap_addr} is not reachable")
            self.kv_mgr.update_status(self.bootstrap_room, KVPoll.Failed)
            return
        info = self.bootstrap_infos[0]
        frames = self.kv_mgr.want(
            self.bootstrap_room,
            np.asarray(kv_indices),
            metadata_index=int(aux_index or 0),
            prefix_tokens=decode_prefix_len or 0,
            prefill=(info["rank_ip"], int(info["rank_port"])),
        )
        if self._send_bootstrap_message(bootstrap_info=info, message=frames, operation="send_metadata"):
            self.init_time = time.time()
        else:
            self.invalidate_cached_bootstrap_infos()

    def abort(self) -> None:
        self.kv_mgr.forget(self.bootstrap_room)
        super().abort()

    def _clear(self) -> None:
        self.kv_mgr.forget(self.bootstrap_room)
        super()._clear()


class PrefillShareKVBootstrapServer(CommonKVBootstrapServer):
    """SGLang's bootstrap server, unchanged."""


def _bytes_at(pointer: int, length: int) -> Any:
    """A uint8 tensor over `length` bytes of this process's memory at `pointer`; the pool outlives it."""
    import torch

    return torch.frombuffer((ctypes.c_uint8 * length).from_address(pointer), dtype=torch.uint8)
