"""One end of a handoff without a model, an HTTP server or a scheduler's loop: for `doctor`, tests and benchmarks.

All of it is what a scheduler's process has: plugins loaded with a role, SGLang's configuration published, its KV pool
of the platform's choice, on prefill its bootstrap server, and the KV manager, built as SGLang's queues build it. Who
uses it drives SGLang's senders and receivers.
"""

from __future__ import annotations

import random
import socket
import time
import warnings
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import xxhash

from sglang_prefillshare.handoff.pool import PageList
from sglang_prefillshare.identity.fingerprint import BaseIdentity
from sglang_prefillshare.protocol import Role
from sglang_prefillshare.settings import DEFAULT_LEASE_TIMEOUT_S, RoleSettings, current_settings, publish

if TYPE_CHECKING:
    import torch

METADATA_ROWS: Final = 512
"""Handoffs that one process can have in flight; SGLang ties the number to its running requests."""

HOST: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class PoolShape:
    """A KV pool: K and V of each layer, pages [0, page_count), of which SGLang never hands out page 0."""

    layers: int
    kv_heads: int
    head_dim: int
    page_count: int
    page_size: int = 1
    dtype: str = "bfloat16"
    device: str = "cpu"

    @property
    def bytes_per_page(self) -> int:
        """Over all layers, K and V."""
        import torch

        itemsize: int = getattr(torch, self.dtype).itemsize
        return 2 * self.layers * self.kv_heads * self.head_dim * self.page_size * itemsize


@dataclass(frozen=True, slots=True)
class Handoff:
    """One request's KV: page k of `source_pages` goes to page k of `target_pages`, both for the whole prompt.

    Decode holds the first `prefix_tokens` (whole pages) already, so they do not move. Prefill sends `chunk_pages` at a
    time, or everything at once; with `stop_after_chunks` it sends so many chunks and leaves it at that.
    """

    room: int
    source_pages: PageList
    target_pages: PageList
    prefix_tokens: int = 0
    chunk_pages: int | None = None
    stop_after_chunks: int | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one side of a handoff ended; times are `time.monotonic_ns()`, the same clock in every process of a host.

    `started_ns` is just before prefill's first `send`, or decode's asking for the pages; None if it never came to that.
    """

    room: int
    failure: str | None
    started_ns: int | None
    ended_ns: int


def new_room() -> int:
    return random.getrandbits(62) + 1


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def become_scheduler(
    role: Role,
    *,
    backend: str,
    page_size: int,
    bootstrap_port: int = 0,
    base: str = "base",
    lease_timeout_s: float = DEFAULT_LEASE_TIMEOUT_S,
) -> None:
    """Load our plugin with a role and publish SGLang's configuration, in the order of a scheduler process.

    Ends with another `base` refuse each other. It may be called again with another page size or port.
    """
    identity = BaseIdentity(weights=base, config="", tokenizer="", chat_template="")
    publish(RoleSettings(role, base, identity, trained=True, transfer_backend=backend, lease_timeout_s=lease_timeout_s))

    warnings.filterwarnings("ignore", category=UserWarning, module="sglang")  # of the kernels that a CPU does without

    # As in a scheduler's process, it is there before the plugins come: they hook what is loaded.
    import sglang.srt.disaggregation.common.conn  # noqa: F401
    import torch
    from sglang.srt import runtime_context
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import ServerArgs

    torch.set_num_threads(1)
    load_plugins()

    args = ServerArgs(
        model_path="dummy",  # SGLang's own name for "no model": nothing is read for it
        host=HOST,
        page_size=page_size,
        disaggregation_mode=role.value,
        disaggregation_transfer_backend=backend,
        disaggregation_bootstrap_port=bootstrap_port,
    )
    ranks = runtime_context.SpawnRanks(world_rank=0, gpu_id=0)
    runtime_context.publish(args, role="scheduler", ranks=ranks)
    # Used between pipeline stages only, and would need torch.distributed.
    runtime_context.get_parallel().override_permanently(pp_group=None)


class Rig:
    """One end in this process, after `become_scheduler`: pool, manager, and on prefill the bootstrap server."""

    def __init__(self, role: Role, backend: str, shape: PoolShape, *, bootstrap_port: int = 0) -> None:
        from sglang.srt.disaggregation.utils import MetadataBuffers, ReqToMetadataIdxAllocator

        self.backend = backend
        self.shape = shape
        self.bootstrap_port = bootstrap_port
        self.pool = _make_pool(shape)
        self.buffers = _pages_of(self.pool, shape)
        """K of each layer and then V, as uint8 [pages, bytes of a page]."""
        self.metadata = MetadataBuffers(
            METADATA_ROWS, hidden_size=16, hidden_states_dtype=self.pool.dtype, max_sampling_mask_tokens=1
        )
        self.metadata_rows = ReqToMetadataIdxAllocator(METADATA_ROWS)
        if role is Role.PREFILL:
            self._bootstrap_server = _start_bootstrap_server(backend, bootstrap_port)
        self.manager = _make_manager(role, backend, shape, self.pool, self.metadata)


class Side:
    """One side of a handoff in flight. `step` is called whenever there may be news; `outcome` is set when it ends."""

    is_busy = False
    """There is more to do at once, without waiting for news."""

    def __init__(self, rig: Rig, handoff: Handoff) -> None:
        self._rig = rig
        self._handoff = handoff
        self.room = handoff.room
        self.outcome: Outcome | None = None
        self._end_point: Any = None  # SGLang's sender or receiver
        self._metadata_row: int | None = None
        self.moving: PageList = handoff.source_pages[:0]
        """The pages of this side that are lent or written into, once that is settled."""
        self._started_ns: int | None = None

    def step(self) -> None:
        from sglang.srt.disaggregation.base.conn import KVPoll

        if self.outcome is not None:
            return
        status = self._end_point.poll()
        if status == KVPoll.Success:
            ended_ns = time.monotonic_ns()
            failure = self._check_metadata()
            self._end_point.clear()
            self._end(failure, ended_ns)
        elif status == KVPoll.Failed:
            self._end(self._reason(), time.monotonic_ns())
        else:
            self._go_on(is_waiting=status == KVPoll.WaitingForInput)

    def abort(self) -> bool:
        if self.outcome is not None:
            return False
        self._end_point.abort()
        return True

    def _go_on(self, *, is_waiting: bool) -> None:
        raise NotImplementedError

    def _check_metadata(self) -> str | None:
        return None

    def _take_metadata_row(self) -> int:
        row = self._rig.metadata_rows.alloc()
        assert row is not None, f"more than {METADATA_ROWS} handoffs in flight"
        self._metadata_row = row
        self._rig.metadata.clear_slot(row)
        return int(row)

    def _reason(self) -> str:
        from sglang.srt.disaggregation.common.conn import KVTransferError

        try:
            self._end_point.failure_exception()  # clears, too
        except KVTransferError as error:
            return str(error.failure_reason)
        return "no reason was recorded"

    def _end(self, failure: str | None, ended_ns: int) -> None:
        if self._metadata_row is not None:
            self._rig.metadata_rows.free(self._metadata_row)
        self.is_busy = False
        self.outcome = Outcome(self.room, failure, self._started_ns, ended_ns)


class Sending(Side):
    """Prefill's side, in the order of calls of SGLang's bootstrap queue and `send_kv_chunk`."""

    def __init__(self, rig: Rig, handoff: Handoff) -> None:
        super().__init__(rig, handoff)
        self._chunks: deque[PageList] = deque()
        sender = backend_class(rig.backend, "SENDER")
        address = f"{HOST}:{rig.bootstrap_port}"
        self._end_point = sender(mgr=rig.manager, bootstrap_addr=address, bootstrap_room=handoff.room)

    def _go_on(self, *, is_waiting: bool) -> None:
        if self._started_ns is None and is_waiting:
            prefix_tokens = self._end_point.pop_decode_prefix_len()
            pages = self._handoff.source_pages[prefix_tokens // self._rig.shape.page_size :]
            row = self._take_metadata_row()
            self._rig.metadata.bootstrap_room[row, 0] = self.room
            self._end_point.init(len(pages), row)
            length = self._handoff.chunk_pages or max(1, len(pages))
            starts = range(0, max(1, len(pages)), length)  # without pages, one empty chunk brings the metadata
            self._chunks.extend(pages[start : start + length] for start in starts[: self._handoff.stop_after_chunks])
            self.moving = pages
            self._started_ns = time.monotonic_ns()
        if self._chunks:
            self._end_point.send(self._chunks.popleft())
        self.is_busy = bool(self._chunks)


class Receiving(Side):
    """Decode's side, in the order of calls of SGLang's preallocation and transfer queues."""

    def __init__(self, rig: Rig, handoff: Handoff, bootstrap_addr: str) -> None:
        super().__init__(rig, handoff)
        if (refusal := _why_unreachable(rig.manager, bootstrap_addr)) is not None:
            self._end(refusal, time.monotonic_ns())
            return
        receiver = backend_class(rig.backend, "RECEIVER")
        self._end_point = receiver(mgr=rig.manager, bootstrap_addr=bootstrap_addr, bootstrap_room=handoff.room)
        self._end_point.init(0)

    def _go_on(self, *, is_waiting: bool) -> None:
        if self._started_ns is None and is_waiting:
            prefix_tokens = self._handoff.prefix_tokens
            pages = self._handoff.target_pages[prefix_tokens // self._rig.shape.page_size :]
            self._started_ns = time.monotonic_ns()
            self.moving = pages
            self._end_point.send_metadata(pages, self._take_metadata_row(), decode_prefix_len=prefix_tokens)

    def _check_metadata(self) -> str | None:
        found = int(self._rig.metadata.bootstrap_room[self._metadata_row, 0].item())
        return None if found == self.room else f"the metadata row is of room {found}, wanted {self.room}"


def fill_pages(buffers: Sequence[torch.Tensor], pages: PageList, *, seed: int) -> None:
    """Write bytes that depend only on `seed` and on the order of `pages`; buffers are uint8 [pages, page_bytes]."""
    import torch

    rng = np.random.default_rng(seed)
    index = torch.from_numpy(pages.astype(np.int64))
    for buffer in buffers:
        content = np.frombuffer(rng.bytes(len(pages) * buffer.shape[1]), dtype=np.uint8).reshape(len(pages), -1)
        buffer[index.to(buffer.device)] = torch.from_numpy(content.copy()).to(buffer.device)


def checksum_pages(buffers: Sequence[torch.Tensor], pages: PageList) -> int:
    import torch

    digest = xxhash.xxh3_64()
    index = torch.from_numpy(pages.astype(np.int64))
    for buffer in buffers:
        digest.update(buffer[index.to(buffer.device)].cpu().numpy().data)
    return digest.intdigest()


def backend_class(backend: str, kind: str) -> Any:
    """SGLang's class of a transfer backend: `kind` is MANAGER, SENDER, RECEIVER, BOOTSTRAP_SERVER or KVARGS."""
    from sglang.srt.disaggregation.utils import KVClassType, TransferBackend, get_kv_class

    return get_kv_class(TransferBackend(backend), KVClassType[kind])


def _make_pool(shape: PoolShape) -> Any:
    """SGLang's pool of the platform's choice: on prefill, with our backend, the one in shared memory."""
    import torch
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
    from sglang.srt.platforms import current_platform

    pool_class = current_platform.get_kv_pool_cls(kind="mha") or MHATokenToKVPool
    return pool_class(
        size=(shape.page_count - 1) * shape.page_size,
        page_size=shape.page_size,
        dtype=getattr(torch, shape.dtype),
        head_num=shape.kv_heads,
        head_dim=shape.head_dim,
        layer_num=shape.layers,
        device=shape.device,
        enable_memory_saver=False,
    )


def _pages_of(pool: Any, shape: PoolShape) -> list[torch.Tensor]:
    import torch

    return [buffer.view(torch.uint8).view(shape.page_count, -1) for buffer in (*pool.k_buffer, *pool.v_buffer)]


def _start_bootstrap_server(backend: str, port: int) -> Any:
    """SGLang's, listening."""
    server = backend_class(backend, "BOOTSTRAP_SERVER")(host=HOST, port=port)
    deadline = time.monotonic() + 10.0
    while True:
        with suppress(OSError):
            socket.create_connection((HOST, port), timeout=1.0).close()
            return server
        if time.monotonic() > deadline:
            raise TimeoutError(f"SGLang's bootstrap server does not listen on port {port}")
        time.sleep(0.01)


def _make_manager(role: Role, backend: str, shape: PoolShape, pool: Any, metadata: Any) -> Any:
    """What `_init_kv_manager` of SGLang's prefill and decode queues does, and our `handshake.init_kv_manager`."""
    from sglang.srt.disaggregation.utils import DisaggregationMode, setup_state_kv_args
    from sglang.srt.runtime_context import get_server_args

    from sglang_prefillshare.host.roles import handshake
    from sglang_prefillshare.host.transfer import pool_device

    settings = current_settings()
    assert settings is not None
    args = backend_class(backend, "KVARGS")()
    args.engine_rank = args.pp_rank = args.gpu_id = 0
    args.system_dp_rank = args.rust_http_port = args.ib_device = None
    args.kv_cache_dtype_str = shape.dtype
    args.kv_layout = handshake.LAYOUT_PREFIX + settings.identity.runtime_fingerprint(shape.dtype)
    args.kv_data_ptrs, args.kv_data_lens, args.kv_item_lens = pool.get_contiguous_buf_infos()
    args.kv_data_mem_kinds = ["DRAM" if shape.device == "cpu" else "VRAM"] * len(args.kv_data_ptrs)
    args.kv_layer_ids = []
    args.kv_head_num = args.total_kv_head_num = shape.kv_heads
    args.page_size = shape.page_size
    args.prefill_start_layer, args.prefill_end_layer = pool.start_layer, pool.end_layer
    args.aux_data_ptrs, args.aux_data_lens, args.aux_item_lens = metadata.get_buf_infos()
    setup_state_kv_args(args, pool, None, shape.layers)
    manager_class = backend_class(backend, "MANAGER")
    with pool_device.stated_by(pool, total_heads=shape.kv_heads):
        return manager_class(args, DisaggregationMode(role.value), get_server_args(), False)


def _why_unreachable(manager: Any, bootstrap_addr: str) -> str | None:
    """SGLang's first look at a prefill worker, or the reason why nothing can be had from it."""
    from sglang_prefillshare.host.roles import handshake

    if manager.try_ensure_parallel_info(bootstrap_addr):
        return None
    refused = handshake._refusals(manager).pop(bootstrap_addr, None)
    return refused or f"no prefill worker answers at {bootstrap_addr}"
