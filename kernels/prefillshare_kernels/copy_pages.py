"""Copying pages from one KV pool to another that the same device can address, all layers in one launch."""

from __future__ import annotations

import torch

from prefillshare_kernels.pool import KVPool
from prefillshare_kernels.rows import Paged, plan, run, tokens_in


def copy_pages(
    source: KVPool,
    target: KVPool,
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
    *,
    tokens: int | None = None,
    source_first: int = 0,
    target_first: int = 0,
    source_head: int = 0,
    target_head: int = 0,
    head_count: int | None = None,
) -> None:
    """Copy tokens of the source's pages onto the target's pages, bit for bit, in every buffer.

    Logical token i of a page list is row i % page_size of page i // page_size; the page sizes of the two sides are
    independent. Token `source_first + i` goes to token `target_first + i`, for i in [0, tokens); `tokens` is by default
    what the source's pages hold from `source_first` on. Heads [source_head, source_head + head_count) of a row go to
    those from `target_head` on; `head_count` is by default all of the source's.

    Page lists are int32 or int64 [pages], contiguous, on the pools' device, and have exactly the pages that
    [0, first + tokens) takes. They may be in any order. A source page may occur several times; target pages are
    distinct, and none of them is a source page of the same pool. Page numbers are not checked: see `check_pages`.

    Returns once the copy is queued on the current stream; the caller keeps the source pages from being rewritten, and
    the target pages from being read, until it has run. Nothing else of the target is written. Raises `ValueError`.
    """
    paged_source = Paged(source, source_pages, source_first, source_head)
    paged_target = Paged(target, target_pages, target_first, target_head)
    launch = plan(
        paged_source,
        paged_target,
        tokens=tokens_in(paged_source) if tokens is None else tokens,
        head_count=source.heads if head_count is None else head_count,
    )
    run(launch, source.device)


def copy_pages_moved_bytes(source: KVPool, *, tokens: int, head_count: int | None = None) -> int:
    """Bytes that `copy_pages` reads plus those that it writes; the page lists do not count."""
    return 2 * tokens * (source.heads if head_count is None else head_count) * sum(source.head_bytes)
