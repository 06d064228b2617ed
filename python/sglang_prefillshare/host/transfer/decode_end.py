"""Decode's end of the `prefillshare` backend: it maps prefill pools, and pulls pages out of them."""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from sglang.srt.disaggregation.base.conn import KVPoll
from sglang.srt.disaggregation.common.conn import CommonKVReceiver

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff import messages, proof
from sglang_prefillshare.handoff.cuda_memory import CudaMapping
from sglang_prefillshare.handoff.lease import ClaimBook
from sglang_prefillshare.handoff.lease_table import LeaseMark, LeaseView
from sglang_prefillshare.handoff.mapping import map_pool
from sglang_prefillshare.handoff.memory import RegionHandle, process_start, watch_process
from sglang_prefillshare.handoff.pool import PageList, PoolView
from sglang_prefillshare.handoff.ranks import HeadSlice, slice_between
from sglang_prefillshare.host.transfer import metrics as handoff_metrics
from sglang_prefillshare.host.transfer.manager import PrefillShareKVManager

if TYPE_CHECKING:
    from sglang_prefillshare.handoff.device_copy import DeviceCopier

logger = logging.getLogger(__name__)


Copy = Callable[[PoolView, PoolView, PageList, PageList, HeadSlice | None], None]
"""Copies pages of a mapped pool, or heads of them, into pages of this worker's; all is there when it returns."""


@dataclass(frozen=True, slots=True)
class _PrefillPool:
    """The KV pool and lease words of one rank of a prefill worker, as mapped into this process.

    `heads` are those that this rank takes of it; None where pages move whole.
    """

    view: PoolView
    leases: LeaseView
    rank: int
    heads: HeadSlice | None


@dataclass(slots=True)
class _Target:
    """Where a room's KV goes: pages of this worker, which are the room's until its claim is released."""

    pages: PageList
    metadata_index: int
    prefill: Mapping[int, tuple[str, int]]
    """The ranks of prefill that it comes from, and where each listens."""
    ready: Any
    """A CUDA event after which nothing older writes into the pages any more; None in host memory."""
    copied: dict[int, int]
    """How many pages have come from each rank."""
    missing: set[int]
    """The ranks whose part is not all here."""


class DecodeKVManager(PrefillShareKVManager):
    """Copies in its control thread, outside the interpreter lock, while the scheduler decodes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        handoff_metrics.prepare("decode")
        self.session = uuid.uuid4().hex
        self.claims: ClaimBook[_Target] = ClaimBook()
        self.forward_stream: Any = None
        """The CUDA stream on which the scheduler runs its batches; set by the role once the scheduler has it."""
        self._pools: dict[int, _PrefillPool] = {}
        self._lent_at_ns: dict[int, int] = {}
        super().__init__(*args, **kwargs)
        self._device_copier: DeviceCopier | None = None
        self._copy = self._copier()
        threading.Thread(target=self.control_loop, name="prefillshare-control", daemon=True).start()
        self._start_heartbeat_checker_thread()

    def _copier(self) -> Copy:
        if self.on_cuda:
            from sglang_prefillshare.handoff.device_copy import DeviceCopier

            self._device_copier = DeviceCopier(self.device)
            return self._device_copier
        from sglang_prefillshare.handoff import copy

        copy.warm_up()
        return copy.copy_pages

    # ---- messages of prefill ---------------------------------------------------------------------------------------

    def handle(self, message: messages.Message) -> None:
        if isinstance(message, messages.Pages):
            self._pull(message)
        elif isinstance(message, messages.Pool):
            try:
                self._attach(message)
            except Exception as error:  # whatever it is, requests wait for this pool
                self._refuse(message.bootstrap_addr, str(error))
        elif isinstance(message, messages.Refused):
            self._refuse(message.bootstrap_addr, message.reason)
        else:
            raise HandoffError(f"a {type(message).__name__} came to a decode worker, which sends them.")

    def _attach(self, message: messages.Pool) -> None:
        self.geometry.check_same(message.geometry, mine="this decode worker", theirs="the prefill worker")
        self.watch(message.pid, message.started, message.bootstrap_addr)
        leases = RegionHandle(message.pid, message.started, message.lease_fd, message.lease_bytes)
        if message.pid in self._pools:
            return  # it introduced itself before; a process has one pool for its lifetime
        total, page_size = self.geometry.total_heads, self.geometry.page_size
        heads = slice_between(message.rank, self.rank, total=total, page_size=page_size)
        view = map_pool(message, device=self.cuda_index)
        if self._device_copier is not None:
            self._device_copier.prepare(view, self.pool, heads)
        self._pools[message.pid] = _PrefillPool(view, LeaseView(leases), message.rank.index, heads)

    def _refuse(self, bootstrap_addr: str, reason: str) -> None:
        """Fail every request that waits for this prefill worker, and forget it, so that the next one asks anew."""
        logger.error("Handshake with prefill worker %s refused: %s", bootstrap_addr, reason)
        with self.connection_lock:
            for key in [key for key in self.connection_pool if key.startswith(f"{bootstrap_addr}_")]:
                del self.connection_pool[key]
            self.prefill_info_table.pop(bootstrap_addr, None)
            rooms = list(self.addr_to_rooms_tracker.get(bootstrap_addr, ()))
        for room in rooms:
            self.fail_room(room, reason)

    def _pull(self, message: messages.Pages) -> None:
        room, is_last = message.room, message.metadata is not None
        try:
            if len(message.pages) % 4:
                raise HandoffError(f"prefill names pages in {len(message.pages)} bytes, wanted 4 for each.")
            pages = np.frombuffer(message.pages, dtype="<i4")
            pool = self._pools.get(message.pid)
            if pool is None:
                raise HandoffError(f"prefill process {message.pid} is gone, or never introduced its pool.")
            with self.claims.writing(room) as target:
                if target is None:
                    return  # given up meanwhile; prefill has been told
                prefill, copied = target.prefill.get(pool.rank), target.copied.get(pool.rank)
                if prefill is None or copied is None:
                    raise HandoffError(f"rank {pool.rank} of prefill was asked for nothing.")
                if message.first != copied:
                    raise HandoffError(f"prefill lends pages from {message.first} on, wanted from {copied} on.")
                onto = target.pages[message.first : message.first + len(pages)]
                if target.ready is not None:
                    target.ready.synchronize()
                self._copy(pool.view, self.pool, pages, onto, pool.heads)
                target.copied[pool.rank] = copied = copied + len(pages)
                if message.metadata is not None:
                    if copied != len(target.pages):
                        raise HandoffError(f"prefill lent {copied} pages, wanted {len(target.pages)}.")
                    self._write_metadata(target.metadata_index, message.metadata)
                    self._lent_at_ns[room] = message.sent_ns
            if not is_last:
                return
            if not pool.leases.holds(LeaseMark(message.lease_slot, message.lease_number)):
                raise HandoffError("prefill gave the request up while its pages were being copied")
        except HandoffError as error:
            self.fail_room(room, str(error))
            return
        except Exception as error:  # of the GPU, say: the request must not wait for what will not come
            logger.exception("Copying the KV of room %s failed", room)
            self.fail_room(room, f"the copy failed: {error}")
            return
        target.missing.discard(pool.rank)
        if not target.missing:
            self.update_status(room, KVPoll.Success)
        self.send(*prefill, messages.Pulled(room=room, session=self.session))

    def _write_metadata(self, index: int, rows: tuple[bytes, ...]) -> None:
        if [len(row) for row in rows] != [buffer.shape[1] for buffer in self.metadata]:
            raise HandoffError(
                "prefill and decode keep different request metadata. Start both with the same SGLang version and "
                "the same --disaggregation-enable-kv-checksum and SGLANG_ENABLE_DISAGG_SAMPLING_MASK."
            )
        for buffer, row in zip(self.metadata, rows, strict=True):
            buffer[index] = np.frombuffer(row, dtype=np.uint8)

    def handle_frames(self, frames: list[bytes]) -> None:
        parsed = self.parse_kv_status_message(frames)
        if parsed is not None:
            room, status, rank, reason = parsed
            self.apply_prefill_status(bootstrap_room=room, status=status, prefill_rank=rank, failure_reason=reason)

    def peer_died(self, pid: int, names: set[str]) -> None:
        pool = self._pools.pop(pid, None)
        if pool is not None:
            self._unmap(pool.view)
        for bootstrap_addr in names:
            self._handle_node_failure(bootstrap_addr)

    def _unmap(self, view: PoolView) -> None:
        if isinstance(view.owner, CudaMapping):
            assert self._device_copier is not None
            self._device_copier.forget(view)
            view.owner.close()

    def prove(self) -> None:
        with self.with_device():
            proof.prove_pulling(self.geometry, self.pool, self._pulled, device=self.cuda_index)

    @contextmanager
    def _pulled(self, lent: messages.Pool, source_pages: PageList, target_pages: PageList) -> Iterator[None]:
        """For a proof: what a peer lends, copied as a request's pages are, and mapped in the block."""
        os.close(watch_process(lent.pid, lent.started))
        LeaseView(RegionHandle(lent.pid, lent.started, lent.lease_fd, lent.lease_bytes))
        view = map_pool(lent, device=self.cuda_index)
        try:
            self._copy(view, self.pool, source_pages, target_pages, None)
            yield
        finally:
            self._unmap(view)

    # ---- calls of the scheduler, through the receiver --------------------------------------------------------------

    def registration(self, bootstrap_addr: str) -> list[bytes]:
        """The frames with which this decode worker introduces itself to a prefill worker."""
        return messages.encode(
            messages.Register(
                session=self.session,
                host=self.local_ip,
                port=self.rank_port,
                pid=os.getpid(),
                started=process_start("self"),
                bootstrap_addr=bootstrap_addr,
                fingerprint=self.fingerprint,
                geometry=self.geometry,
            )
        )

    def want(
        self,
        room: int,
        pages: PageList,
        *,
        metadata_index: int,
        prefix_tokens: int,
        prefill: Mapping[int, tuple[str, int]],
        readers: int,
    ) -> list[bytes]:
        """Claim `pages` for a room and return the frames that ask for its KV, as one of `readers` of every rank.

        `prefill` says where the ranks listen that it comes from.
        """
        ready = self.forward_stream.record_event() if self.forward_stream is not None else None
        copied = dict.fromkeys(prefill, 0)
        self.claims.claim(
            room, _Target(pages.astype(np.int32), metadata_index, prefill, ready, copied, missing=set(prefill))
        )
        self._count_pages()
        return messages.encode(
            messages.Want(
                room=room,
                session=self.session,
                page_count=len(pages),
                prefix_tokens=prefix_tokens,
                readers=readers,
            )
        )

    def take_handoff_s(self, room: int) -> float | None:
        """Seconds since prefill lent the last page of a room; asked once, when decode takes the KV over."""
        lent_at_ns = self._lent_at_ns.pop(room, None)
        return None if lent_at_ns is None else (time.monotonic_ns() - lent_at_ns) / 1e9

    def release(self, room: int) -> None:
        """Give a room's pages back: after this returns, nothing is written into them on its behalf."""
        self.claims.release(room)
        self._lent_at_ns.pop(room, None)
        self._count_pages()

    def _count_pages(self) -> None:
        handoff_metrics.set_pages("decode", sum(len(target.pages) for target in self.claims.targets()))


class PrefillShareKVReceiver(CommonKVReceiver):
    """Decode's half of one request."""

    kv_mgr: DecodeKVManager

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
        frames = self.kv_mgr.want(
            self.bootstrap_room,
            np.asarray(kv_indices),
            metadata_index=int(aux_index or 0),
            prefix_tokens=decode_prefix_len or 0,
            prefill={
                rank: (info["rank_ip"], int(info["rank_port"]))
                for rank, info in zip(self.target_tp_ranks, self.bootstrap_infos, strict=True)
            },
            readers=self.required_dst_info_num,
        )
        if all(
            self._send_bootstrap_message(bootstrap_info=info, message=frames, operation="send_metadata")
            for info in self.bootstrap_infos
        ):
            self.init_time = time.time()
        else:
            self.invalidate_cached_bootstrap_infos()

    def abort(self) -> None:
        self.kv_mgr.release(self.bootstrap_room)
        super().abort()

    def failure_exception(self) -> None:
        self.kv_mgr.explain(self.bootstrap_room)
        self.ensure_abort_notified()  # prefill may not know: then it would keep its pages until the lease is overdue
        super().failure_exception()

    def _clear(self) -> None:
        self.kv_mgr.release(self.bootstrap_room)
        super()._clear()
