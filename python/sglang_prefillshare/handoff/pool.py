"""A KV pool as a copy sees it: buffers of pages at addresses, ours or a peer's mapped into this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.ranks import HeadSlice

if TYPE_CHECKING:
    import torch

PageList = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PoolView:
    """`page_count` pages in each buffer; page p of buffer i begins at addresses[i] + p * page_bytes[i].

    `owner` is whatever keeps the memory mapped for as long as the view lives.
    """

    addresses: npt.NDArray[np.int64]
    page_bytes: npt.NDArray[np.int64]
    page_count: int
    owner: Any = field(repr=False)

    @classmethod
    def at(cls, addresses: Sequence[int], page_bytes: Sequence[int], page_count: int, *, owner: Any) -> PoolView:
        if len(addresses) != len(page_bytes):
            raise HandoffError(f"a pool has {len(addresses)} buffers and {len(page_bytes)} page sizes.")
        return cls(np.asarray(addresses, np.int64), np.asarray(page_bytes, np.int64), page_count, owner)

    @classmethod
    def of_tensors(cls, buffers: Sequence[torch.Tensor]) -> PoolView:
        """A view of contiguous tensors whose first dimension counts pages."""
        for buffer in buffers:
            if not buffer.is_contiguous() or buffer.shape[0] != buffers[0].shape[0]:
                raise HandoffError("the buffers of a pool must be contiguous and of one page count.")
        page_bytes = [buffer[0].numel() * buffer.element_size() for buffer in buffers]
        return cls.at([b.data_ptr() for b in buffers], page_bytes, buffers[0].shape[0], owner=list(buffers))

    @property
    def bytes_per_page(self) -> int:
        """Bytes of one page over all buffers."""
        return int(self.page_bytes.sum())


def check_pages(pages: PageList, page_count: int, *, whose: str) -> None:
    """Raise `HandoffError` for a page outside [0, page_count)."""
    if len(pages) and (int(pages.min()) < 0 or int(pages.max()) >= page_count):
        raise HandoffError(
            f"{whose} names page {int(pages.min())}..{int(pages.max())} of a pool with {page_count} pages."
        )


def check_copy(
    source: PoolView,
    target: PoolView,
    source_pages: PageList,
    target_pages: PageList,
    heads: HeadSlice | None = None,
) -> None:
    """Raise `HandoffError` unless these pages of these pools, or these heads of them, can be copied."""
    if len(source_pages) != len(target_pages):
        raise HandoffError(f"{len(source_pages)} source pages for {len(target_pages)} target pages.")
    source_parts, target_parts = (1, 1) if heads is None else (heads.source_heads, heads.target_heads)
    if not np.array_equal(source.page_bytes * target_parts, target.page_bytes * source_parts):
        raise HandoffError(
            f"source pages have {source.page_bytes.tolist()} bytes per buffer, target pages "
            f"{target.page_bytes.tolist()}" + (f", for {source_parts} and {target_parts} heads." if heads else ".")
        )
    check_pages(source_pages, source.page_count, whose="the source")
    check_pages(target_pages, target.page_count, whose="the target")
