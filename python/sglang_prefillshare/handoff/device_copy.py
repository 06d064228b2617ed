"""Copying pages between two KV pools that one GPU can address: ours, and a peer's that is mapped here. One launch."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import torch

from prefillshare_kernels.copy_pages import copy_pages
from prefillshare_kernels.pool import KVPool
from sglang_prefillshare.handoff.pool import PageList, PoolView, check_copy


class DeviceCopier:
    """Copies on a stream of its own, beside the batches that the scheduler runs, and returns when the copy is done.

    For one thread. Kernels take a page for a row: whole pages move, whatever their size in tokens.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._pools: dict[int, tuple[PoolView, KVPool]] = {}

    def __call__(self, source: PoolView, target: PoolView, source_pages: PageList, target_pages: PageList) -> None:
        check_copy(source, target, source_pages, target_pages)
        if len(source_pages) == 0:
            return
        with self._on_stream():
            lists = torch.from_numpy(np.stack((source_pages, target_pages)).astype(np.int32)).to(self._device)
            copy_pages(self._described(source), self._described(target), lists[0], lists[1])
        if self._stream is not None:
            self._stream.synchronize()

    def forget(self, view: PoolView) -> None:
        """Drop what is kept about a pool that is not mapped any more."""
        self._pools.pop(id(view), None)

    def _described(self, view: PoolView) -> KVPool:
        if id(view) not in self._pools:
            pool = KVPool(
                addresses=tuple(int(address) for address in view.addresses),
                row_bytes=tuple(int(size) for size in view.page_bytes),
                page_size=1,
                page_count=view.page_count,
                device=self._device,
            )
            self._pools[id(view)] = (view, pool)  # with the view, so that its id stays its own
        return self._pools[id(view)][1]

    def _on_stream(self) -> contextlib.AbstractContextManager[Any]:
        if self._stream is None:
            return contextlib.nullcontext()
        torch.cuda.set_device(self._device)
        return torch.cuda.stream(self._stream)  # type: ignore[no-any-return]
