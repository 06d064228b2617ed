"""Copying pages between two KV pools that one GPU can address: ours, and a peer's that is mapped here. One launch."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch

from prefillshare_kernels.planned import PlannedCopy
from prefillshare_kernels.pool import KVPool
from sglang_prefillshare.handoff.pool import PageList, PoolView, check_copy
from sglang_prefillshare.handoff.ranks import HeadSlice

IN_PLACE_PAGES: Final = 64
"""Page lists up to here are read by the kernel where they lie, in pinned memory of the host.

Every buffer's programs read them again over PCIe, which for short lists is quicker than to queue a copy of them and to
have the kernel wait for it; longer ones are copied to the GPU once."""


_INT32: Final = np.dtype(np.int32)
"""One object in NumPy, so that looking at a list's type takes no time."""


class DeviceCopier:
    """Copies on a stream of its own, beside the batches that the scheduler runs, and returns when the copy is done.

    For one thread. Where whole pages move, kernels take a page for a row, whatever its size in tokens. What is the same
    in every copy of a pair of pools is done in `prepare`; a copy allocates nothing.
    """

    def __init__(self, device: torch.device, *, in_place_pages: int = IN_PLACE_PAGES) -> None:
        self._device = device
        self._in_place_pages = in_place_pages
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._stream_handle: int | None = self._stream.cuda_stream if self._stream is not None else None
        self._copies: dict[tuple[int, int], PlannedCopy] = {}
        self._views: dict[tuple[int, int], tuple[PoolView, PoolView]] = {}  # kept, so that their ids stay theirs
        self._numbers: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self._reserve(1)

    def prepare(self, source: PoolView, target: PoolView, heads: HeadSlice | None = None) -> None:
        """Plan copies from `source` to `target`, of whole pages or of these heads of them, and compile their kernels.

        That takes seconds where they are not cached. Call it when the pool is mapped, so that no request pays for it; a
        copy between pools that are not prepared prepares them. Both are kept until `forget`. Raises `HandoffError` for
        pools of different geometry.
        """
        none = np.zeros(0, np.int32)
        check_copy(source, target, none, none, heads)
        self._make_current()
        pair = id(source), id(target)
        self._views[pair] = source, target
        if heads is None:
            self._copies[pair] = PlannedCopy(self._pool(source), self._pool(target))
        else:
            self._copies[pair] = PlannedCopy(
                self._pool(source, page_size=heads.page_size, heads=heads.source_heads),
                self._pool(target, page_size=heads.page_size, heads=heads.target_heads),
                source_head=heads.source_first,
                target_head=heads.target_first,
                head_count=heads.count,
            )
        self._reserve(target.page_count)  # target pages are distinct

    def __call__(
        self,
        source: PoolView,
        target: PoolView,
        source_pages: PageList,
        target_pages: PageList,
        heads: HeadSlice | None = None,
    ) -> None:
        count = len(source_pages)
        if count == 0 or len(target_pages) != count or not source_pages.dtype is target_pages.dtype is _INT32:
            check_copy(source, target, source_pages, target_pages, heads)
            if count == 0:
                return
        copy = self._copies.get((id(source), id(target)))
        if copy is None:
            self.prepare(source, target, heads)
            copy = self._copies[id(source), id(target)]
        if 2 * count > len(self._numbers):
            self._reserve(count)
        # The last copy has run, so that nothing reads the lists any more.
        self._numbers[:count] = source_pages
        self._numbers[count : 2 * count] = target_pages
        # As unsigned numbers negative ones are the largest: one look at both lists, a closer one where it is needed.
        if np.maximum.reduce(self._unsigned[: 2 * count]) >= min(source.page_count, target.page_count):
            check_copy(source, target, source_pages, target_pages, heads)
        if self._stream is None:
            copy(self._host_lists, count)
            return
        self._make_current()
        lists = self._host_lists
        if count > self._in_place_pages:
            lists = self._device_lists
            with torch.cuda.stream(self._stream):
                lists[: 2 * count].copy_(self._host_lists[: 2 * count], non_blocking=True)
        copy(lists, count, stream=self._stream_handle)
        self._stream.synchronize()

    def forget(self, view: PoolView) -> None:
        """Drop what is kept about a pool that is not mapped any more."""
        for pair in [pair for pair in self._copies if id(view) in pair]:
            del self._copies[pair], self._views[pair]

    def _pool(self, view: PoolView, *, page_size: int = 1, heads: int = 1) -> KVPool:
        """As the kernels see it; by default with a page for a row."""
        return KVPool(
            addresses=tuple(int(address) for address in view.addresses),
            row_bytes=tuple(int(size) // page_size for size in view.page_bytes),
            page_size=page_size,
            page_count=view.page_count,
            device=self._device,
            heads=heads,
        )

    def _reserve(self, count: int) -> None:
        """Have room for two page lists of `count` pages each."""
        if 2 * count <= len(self._numbers):
            return
        on_cuda = self._device.type == "cuda"
        self._host_lists = torch.zeros(2 * count, dtype=torch.int32, pin_memory=on_cuda)
        self._device_lists = torch.zeros(2 * count, dtype=torch.int32, device=self._device)
        if on_cuda:
            torch.cuda.current_stream(
                self._device
            ).synchronize()  # the zeros must not come after our own stream's lists
        self._numbers = self._host_lists.numpy()
        self._unsigned = self._numbers.view(np.uint32)

    def _make_current(self) -> None:
        """Make the device current in this thread, where anything may have run since the last copy."""
        if self._stream is not None:
            torch.cuda.set_device(self._device)
