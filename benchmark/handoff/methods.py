"""The ways to bring a prompt's KV from one pool into another that are compared. Each checks its answer first."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any, Final, Protocol

import numpy as np
import torch

from benchmark.handoff.cases import Case
from sglang_prefillshare.host.transfer.rig import Handoff, PoolShape, checksum_pages, fill_pages, new_room
from test.support.handoff_pair import HandoffPair

COPY_LIMIT: Final = "memcpy"
"""The method that the others are measured against: one copy of as many bytes, side by side on both ends."""

OURS: Final = "prefillshare"
OUR_COPY: Final = "prefillshare, copy only"
NIXL: Final = "nixl"
INDEX_COPY: Final = "torch index copy"
STAGING: Final = "SGLang staging kernels"


class Method(Protocol):
    """`check` fills both pools, moves the pages once and raises `AssertionError` unless all of them arrived."""

    def check(self, case: Case) -> None: ...

    def measure(self, case: Case) -> dict[str, float]:
        """Move the pages once; seconds by name of what was measured."""
        ...


class ThroughPair:
    """Two processes over a transfer backend, from prefill's `send` until decode's `poll` says that it is all there."""

    def __init__(self, pair: HandoffPair) -> None:
        self._pair = pair
        self._backend = pair.prefill.spec.backend
        self._copy_s = 0.0
        everything = np.arange(pair.prefill.spec.shape.page_count, dtype=np.int32)
        pair.prefill.fill(everything, seed=1)  # from here on no page is touched for the first time
        pair.decode.fill(everything, seed=2)
        self._pair.pause()

    def check(self, case: Case) -> None:
        self._pair.resume()
        self._pair.prefill.fill(case.source_pages, seed=3)
        self._pair.decode.fill(case.target_pages, seed=4)
        self._pair.pause()
        self.measure(case)
        self._pair.resume()
        sent, received = (
            self._pair.prefill.checksum(case.source_pages),
            self._pair.decode.checksum(case.target_pages),
        )
        self._pair.pause()
        assert sent == received, f"{self._backend}: {case.tokens} tokens, {case.layout}: other bytes arrived"

    def measure(self, case: Case) -> dict[str, float]:
        """While others are measured both processes are stopped: threads of NIXL's spin also when there is no work."""
        self._pair.resume()
        [ended] = self._pair.hand_over([Handoff(new_room(), case.source_pages, case.target_pages)])
        before, self._copy_s = self._copy_s, self._pair.decode.copy_seconds()
        self._pair.pause()
        measured = {self._backend: ended.seconds}
        if self._copy_s > before:
            measured[f"{self._backend}, copy only"] = self._copy_s - before
        return measured


class LocalPools:
    """A source and a target pool within this process, warmed: a flat run of memory each, and its buffers in pages."""

    def __init__(self, shape: PoolShape) -> None:
        self.shape = shape
        self.flat_source, self.flat_target = (
            torch.ones(shape.page_count * shape.bytes_per_page, dtype=torch.uint8, device=shape.device)
            for _ in range(2)
        )
        self.source, self.target = (
            list(flat.view(2 * shape.layers, shape.page_count, -1)) for flat in (self.flat_source, self.flat_target)
        )

    def synchronize(self) -> None:
        if self.shape.device != "cpu":
            torch.cuda.synchronize()


class Local:
    """One thread, or one stream, copying between the local pools."""

    def __init__(self, name: str, pools: LocalPools, move: Callable[[LocalPools, Case], None]) -> None:
        self._name = name
        self._pools = pools
        self._move = move

    def check(self, case: Case) -> None:
        fill_pages(self._pools.source, case.source_pages, seed=3)
        fill_pages(self._pools.target, case.target_pages, seed=4)
        self.measure(case)
        sent = checksum_pages(self._pools.source, case.source_pages)
        received = checksum_pages(self._pools.target, case.target_pages)
        assert sent == received, f"{self._name}: {case.tokens} tokens, {case.layout}: other bytes arrived"

    def measure(self, case: Case) -> dict[str, float]:
        self._pools.synchronize()
        started = time.perf_counter()
        self._move(self._pools, case)
        self._pools.synchronize()
        return {self._name: time.perf_counter() - started}


class CopyLimit(Local):
    """What this machine can copy; it knows nothing of pages, so it has an answer of its own to check."""

    def __init__(self, pools: LocalPools) -> None:
        super().__init__(COPY_LIMIT, pools, _move_flat)

    def check(self, case: Case) -> None:
        count = _byte_count(self._pools, case)
        self._pools.flat_target[:count] = 0
        self.measure(case)
        assert torch.equal(self._pools.flat_source[:count], self._pools.flat_target[:count]), "memcpy"


def index_copy(pools: LocalPools, case: Case) -> None:
    """The plain way in torch, buffer by buffer."""
    device = pools.shape.device
    source_index, target_index = (
        torch.from_numpy(pages.astype(np.int64)).to(device) for pages in (case.source_pages, case.target_pages)
    )
    for source, target in zip(pools.source, pools.target, strict=True):
        target.index_copy_(0, target_index, source.index_select(0, source_index))


def staging_kernels(pools: LocalPools) -> Callable[[LocalPools, Case], None]:
    """SGLang's gather into and scatter out of a staging buffer, without the transfer between two; CUDA only."""
    from sglang.srt.disaggregation.common import staging_buffer

    shape = pools.shape
    staging = staging_buffer.StagingBuffer(pools.flat_source.numel(), shape.device, 0)
    dtype = getattr(torch, shape.dtype)

    def by_layer(buffers: list[torch.Tensor]) -> tuple[list[Any], list[Any]]:
        tokens = [buffer.view(dtype).view(-1, shape.kv_heads, shape.head_dim) for buffer in buffers]
        return tokens[: shape.layers], tokens[shape.layers :]

    source, target = by_layer(pools.source), by_layer(pools.target)

    def move(_pools: LocalPools, case: Case) -> None:
        staging_buffer.gather_all_layers_to_staging(
            *source, case.source_pages, staging, 0, shape.kv_heads, shape.page_size
        )
        target_pages = torch.from_numpy(case.target_pages.astype(np.int64)).to(shape.device)
        staging_buffer.scatter_staging_to_kv(
            staging.buffer, *target, target_pages, shape.page_size, 1, 1, 0, shape.kv_heads
        )

    return move


def _byte_count(pools: LocalPools, case: Case) -> int:
    return len(case.source_pages) * pools.shape.bytes_per_page


def _move_flat(pools: LocalPools, case: Case) -> None:
    count = _byte_count(pools, case)
    if pools.shape.device == "cpu":
        ctypes.memmove(pools.flat_target.data_ptr(), pools.flat_source.data_ptr(), count)
    else:
        pools.flat_target[:count].copy_(pools.flat_source[:count])
