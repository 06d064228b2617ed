"""Prefill's end of the `prefillshare` backend: it offers its pool, and lends pages of it."""

from __future__ import annotations

import logging
import os
import threading
import time
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import AbortNotification, CommonKVSender

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import messages, proof
from sglang_prefillshare.handoff.cuda_memory import CudaAllocations, device_uuid
from sglang_prefillshare.handoff.lease import LeaseBook, Loan, Wanted
from sglang_prefillshare.handoff.lease_table import LeaseTable
from sglang_prefillshare.handoff.memory import SharedRegion, process_start
from sglang_prefillshare.handoff.pool import PageList
from sglang_prefillshare.host.transfer import metrics as handoff_metrics
from sglang_prefillshare.host.transfer.manager import ABORT_TAG, PrefillShareKVManager
from sglang_prefillshare.settings import lease_timeout_s

logger = logging.getLogger(__name__)

GIVEN_UP_BY_DECODE = "decode gave the request up"
GIVEN_UP_BY_PREFILL = "prefill gave the request up"


@dataclass(frozen=True, slots=True)
class _DecodePeer:
    """Where a decode process that registered here listens."""

    host: str
    port: int


@dataclass(slots=True)
class _Listener:
    """One decode process's half of a room, in the form that SGLang's status messages look it up."""

    endpoint: str
    dst_port: int
    required_dst_info_num: int = 1
    is_dummy: bool = False


class PrefillKVManager(PrefillShareKVManager):
    """Keeps SGLang's status of every room in step with the lease book, which decides."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Registering with the bootstrap server, in the base class, lets peers in: be ready for them before.
        handoff_metrics.prepare("prefill")
        self._lease_table = LeaseTable.create()
        self.leases = LeaseBook(self._lease_table, timeout_s=lease_timeout_s())
        self._peers: dict[str, _DecodePeer] = {}
        super().__init__(*args, **kwargs)
        # On a GPU the pages of a chunk may still be being written: whoever announces them waits for that, in order,
        # and the scheduler does not.
        self._announcer: Executor | None = ThreadPoolExecutor(1, "prefillshare-announce") if self.on_cuda else None
        threading.Thread(target=self.control_loop, name="prefillshare-control", daemon=True).start()

    # ---- messages of decode ----------------------------------------------------------------------------------------

    def handle(self, message: messages.Message) -> None:
        if isinstance(message, messages.Register):
            self._register(message)
        elif isinstance(message, messages.Want):
            self._want(message)
        elif isinstance(message, messages.Pulled):
            loan = self.leases.confirm(message.room, message.session)
            if loan is not None:
                self._count(loan, "ok")
                # Last: the scheduler wakes up, releases the pages and closes the room.
                self.update_status(message.room, KVPoll.Success)
        else:
            raise HandoffError(f"a {type(message).__name__} came to a prefill worker, which sends them.")

    def _register(self, message: messages.Register) -> None:
        try:
            if message.fingerprint != self.fingerprint:
                raise HandoffError(
                    f"this prefill worker serves base {self.fingerprint}, the decode module was fine-tuned on "
                    f"{message.fingerprint}. Point it at a prefill worker of its own base."
                )
            self.geometry.check_same(message.geometry, mine="this prefill worker", theirs="the decode worker")
            self.watch(message.pid, message.started, message.session)
            answer: messages.Message = self._offer(message.bootstrap_addr)
            self._peers[message.session] = _DecodePeer(message.host, message.port)
        except HandoffError as error:
            logger.error("Refusing decode worker %s:%s: %s", message.host, message.port, error)
            answer = messages.Refused(bootstrap_addr=message.bootstrap_addr, reason=str(error))
        self.send(message.host, message.port, answer)

    def prove(self) -> None:
        with self.with_device():
            proof.prove_lending(self._offer(""), self.pool, device=self.cuda_index)

    def _offer(self, bootstrap_addr: str) -> messages.Pool:
        leases = self._lease_table.handle
        return messages.Pool(
            bootstrap_addr=bootstrap_addr,
            pid=os.getpid(),
            started=process_start("self"),
            lease_fd=leases.fd,
            lease_bytes=leases.size,
            page_count=self.pool.page_count,
            geometry=self.geometry,
            memory=self._cuda_memory() if self.on_cuda else self._host_memory(),
            rank=self.rank,
        )

    def _host_memory(self) -> messages.HostMemory:
        places = [SharedRegion.owning(int(address)) for address in self.pool.addresses]
        regions = {place[0].handle for place in places if place is not None}
        if None in places or len(regions) != 1:
            raise HandoffError(
                "the KV pool of this prefill worker is not in shared memory. The prefillshare backend needs the CPU "
                "platform; choose --disaggregation-transfer-backend nixl."
            )
        region = regions.pop()
        offsets = tuple(place[1] for place in places if place is not None)
        return messages.HostMemory(fd=region.fd, region_bytes=region.size, offsets=offsets)

    def _cuda_memory(self) -> messages.CudaMemory:
        allocations = CudaAllocations([int(address) for address in self.pool.addresses], device=self.device.index)
        return messages.CudaMemory(
            device_uuid=device_uuid(self.device.index),
            handles=tuple(allocations.handles),
            buffers=tuple(allocations.places),
        )

    def _want(self, message: messages.Want) -> None:
        peer = self._peers.get(message.session)
        if peer is None:
            logger.warning("Room %s is wanted by an unregistered decode worker", message.room)
            return
        wanted = Wanted(message.session, message.page_count, message.readers)
        if (reason := self.leases.want(message.room, wanted)) is not None:
            self.send_kv_status_message(
                targets=[(peer.host, peer.port)],
                bootstrap_room=message.room,
                status=KVPoll.Failed,
                failure_reason=reason,
            )
            return
        listeners = self.transfer_infos.setdefault(message.room, {})
        listeners[message.session] = _Listener(peer.host, peer.port, required_dst_info_num=message.readers)
        self.req_to_decode_prefix_len[message.room] = message.prefix_tokens
        if self.leases.is_asked_for(message.room):
            self.update_status(message.room, KVPoll.WaitingForInput)

    def handle_frames(self, frames: list[bytes]) -> None:
        notification = AbortNotification.from_zmq(frames) if frames and frames[0] == ABORT_TAG else None
        if notification is None:
            return
        if self.leases.abandon(notification.room, GIVEN_UP_BY_DECODE):
            self._fail_open_room(notification.room, GIVEN_UP_BY_DECODE)
        else:
            self._forget(notification.room)  # wanted by decode, never sent to this prefill worker

    def peer_died(self, pid: int, names: set[str]) -> None:
        for session in names:
            self._peers.pop(session, None)
            open_rooms, orphans = self.leases.leave(session)
            for room in open_rooms:
                self._fail_open_room(room, "the decode worker died")
            for room in orphans:
                self._forget(room)

    def _fail_open_room(self, room: int, reason: str) -> None:
        if room in self.request_status:
            self.fail_room(room, reason)
        else:
            self.leases.fail(room, reason)  # its sender is only just being made, and will ask

    def _forget(self, room: int) -> None:
        self.transfer_infos.pop(room, None)
        self.req_to_decode_prefix_len.pop(room, None)
        self.request_status.pop(room, None)

    # ---- calls of the scheduler, through the sender ----------------------------------------------------------------

    def update_status(self, bootstrap_room: int, status: KVPoll) -> None:
        if status == KVPoll.Failed and bootstrap_room in self.request_status:
            # Before anybody can see the failure and release pages.
            loan = self.leases.fail(bootstrap_room, self.failure_records.get(bootstrap_room, GIVEN_UP_BY_PREFILL))
            if loan is not None:
                self._count(loan, "failed")
        super().update_status(bootstrap_room, status)

    def add_transfer_request(
        self,
        bootstrap_room: int,
        kv_indices: PageList,
        index_slice: slice,
        is_last_chunk: bool,
        aux_index: int | None = None,
        state_indices: list[Any] | None = None,
        num_kv_tokens: int | None = None,
        *,
        wait_event: Any = None,
        **_ignored: Any,
    ) -> None:
        """Lend decode the pages `kv_indices` of our pool: pages [index_slice) of what it wants."""
        if self.request_status.get(bootstrap_room) in (None, KVPoll.Failed):
            return
        metadata = None
        if is_last_chunk:
            assert aux_index is not None
            metadata = tuple(buffer[aux_index].tobytes() for buffer in self.metadata)
        pages = np.ascontiguousarray(kv_indices, dtype="<i4").tobytes()
        self.update_status(bootstrap_room, KVPoll.Transferring)
        if self._announcer is None:
            self._lend(bootstrap_room, index_slice, pages, metadata)
        else:
            self._announcer.submit(self._lend_later, wait_event, bootstrap_room, index_slice, pages, metadata)

    def _lend_later(self, written: Any, room: int, *lent: Any) -> None:
        """Lend pages once they are `written`: a CUDA event, or None where they are."""
        try:
            if written is not None:
                with self.with_device():
                    written.synchronize()
            self._lend(room, *lent)
        except Exception as error:  # of the GPU, say: nobody looks at what became of the task
            logger.exception("The pages of room %s could not be lent", room)
            self.conclude_failure(bootstrap_room=room, failure_reason=f"prefill could not lend its pages: {error}")

    def _lend(self, room: int, place: slice, pages: bytes, metadata: tuple[bytes, ...] | None) -> None:
        try:
            is_last = metadata is not None
            lent = self.leases.lend(room, first=place.start, page_count=place.stop - place.start, is_last=is_last)
            if lent is None:
                return
            readers, mark = lent
            handoff_metrics.set_pages("prefill", self.leases.pages_on_loan)
            lent_pages = messages.Pages(
                room=room,
                pid=os.getpid(),
                first=place.start,
                pages=pages,
                lease_slot=mark.slot,
                lease_number=mark.number,
                sent_ns=time.monotonic_ns(),
                metadata=metadata,
            )
            for reader in readers:
                peer = self._peers.get(reader.session)
                if peer is None:
                    raise HandoffError("the decode worker died")
                self.send(peer.host, peer.port, lent_pages)
        except (HandoffError, zmq.ZMQError) as error:
            self.conclude_failure(bootstrap_room=room, failure_reason=str(error))

    def _count(self, loan: Loan, outcome: str) -> None:
        handoff_metrics.observe(
            "prefill",
            outcome,
            moved_tokens=loan.page_count * self.geometry.page_size,
            moved_bytes=loan.page_count * self.geometry.bytes_per_page,
            seconds=loan.held_s,
        )
        handoff_metrics.set_pages("prefill", self.leases.pages_on_loan)


class PrefillShareKVSender(CommonKVSender):
    """Prefill's half of one request."""

    kv_mgr: PrefillKVManager

    def __init__(self, mgr: PrefillKVManager, bootstrap_addr: str, bootstrap_room: int, **kwargs: Any) -> None:
        abandoned = mgr.leases.open(bootstrap_room)
        super().__init__(mgr, bootstrap_addr, bootstrap_room, **kwargs)
        reason = abandoned or mgr.leases.failure(bootstrap_room)
        if reason is not None:
            mgr.record_failure(bootstrap_room, reason)
            mgr.update_status(bootstrap_room, KVPoll.Failed)

    def poll(self) -> KVPoll:
        status = super().poll()
        if status == KVPoll.Transferring and (reason := self.kv_mgr.leases.overdue(self.bootstrap_room)) is not None:
            self.kv_mgr.conclude_failure(bootstrap_room=self.bootstrap_room, failure_reason=reason)
            return super().poll()
        return status

    def failure_exception(self) -> None:
        self.kv_mgr.explain(self.bootstrap_room)
        super().failure_exception()

    def abort(self) -> None:
        self.kv_mgr.conclude_failure(bootstrap_room=self.bootstrap_room, failure_reason=GIVEN_UP_BY_PREFILL)
        super().abort()

    def clear(self) -> None:
        super().clear()
        self.kv_mgr.leases.close(self.bootstrap_room, GIVEN_UP_BY_PREFILL)
