"""Copying pages between two KV pools in host memory.

Pages that lie side by side in both pools move as one run; a request's pages usually do, because allocators hand them
out in order. What remains scattered goes through one indexed copy per buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from sglang_prefillshare.errors import HandoffError

if TYPE_CHECKING:
    import torch

PageList = npt.NDArray[np.int32]

_MIN_MEAN_RUN_PAGES: Final = 8
"""Below this mean run length an indexed copy is faster than one slice copy per run."""


def contiguous_runs(source: PageList, target: PageList) -> list[tuple[int, int, int]]:
    """Split a page mapping into (source page, target page, length) runs that are contiguous on both sides."""
    if len(source) == 0:
        return []
    breaks = np.flatnonzero((np.diff(source) != 1) | (np.diff(target) != 1)) + 1
    starts = np.concatenate(([0], breaks))
    lengths = np.diff(np.concatenate((starts, [len(source)])))
    return [(int(source[i]), int(target[i]), int(n)) for i, n in zip(starts, lengths, strict=True)]


def check_pages(pages: PageList, page_count: int, *, whose: str) -> None:
    """Raise `HandoffError` for a page outside [0, page_count)."""
    if len(pages) and (int(pages.min()) < 0 or int(pages.max()) >= page_count):
        raise HandoffError(
            f"{whose} names page {int(pages.min())}..{int(pages.max())} of a pool with {page_count} pages."
        )


def copy_pages(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], source_pages: PageList, target_pages: PageList
) -> None:
    """Copy source[i][source_pages[k]] to target[i][target_pages[k]] for every buffer i and every k.

    Each tensor is uint8 [pages, page_bytes], contiguous, in host memory. Bit-exact; the caller keeps the source pages
    from being rewritten until this returns.
    """
    import torch

    if len(source_pages) != len(target_pages):
        raise HandoffError(f"{len(source_pages)} source pages for {len(target_pages)} target pages.")
    runs = contiguous_runs(source_pages, target_pages)
    if len(runs) * _MIN_MEAN_RUN_PAGES <= len(source_pages) or len(runs) == 1:
        for src, dst in zip(source, target, strict=True):
            for first, onto, length in runs:
                dst[onto : onto + length].copy_(src[first : first + length])
        return
    from_index = torch.from_numpy(source_pages.astype(np.int64))
    to_index = torch.from_numpy(target_pages.astype(np.int64))
    for src, dst in zip(source, target, strict=True):
        dst.index_copy_(0, to_index, src.index_select(0, from_index))
