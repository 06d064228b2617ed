"""Gathering pages into contiguous staging memory, and scattering them from it, all layers in one launch each.

For paths where one side cannot address the other's memory: gather, transfer one block, scatter. The block is
[buffer][token][head_count heads] without gaps, in the order of the pool's buffers.
"""

from __future__ import annotations

import torch

from prefillshare_kernels.pool import KVPool
from prefillshare_kernels.rows import Paged, Staged, plan, run, tokens_in


def staging_bytes(pool: KVPool, *, tokens: int, head_count: int | None = None) -> int:
    """Bytes that `tokens` tokens take in a staging buffer; `head_count` is by default all of the pool's heads."""
    return tokens * (pool.heads if head_count is None else head_count) * sum(pool.head_bytes)


def gather_pages(
    pool: KVPool,
    pages: torch.Tensor,
    staging: torch.Tensor,
    *,
    tokens: int | None = None,
    first: int = 0,
    head: int = 0,
    head_count: int | None = None,
) -> None:
    """Copy tokens [first, first + tokens) of `pages` to the front of `staging`, bit for bit.

    `staging` is uint8 [bytes], contiguous, on the pool's device, at least `staging_bytes()` long; what lies beyond is
    not written. Page lists, `tokens`, heads, streams and errors are as in `copy_pages`.
    """
    side = Paged(pool, pages, first, head)
    launch = plan(
        side,
        Staged(staging),
        tokens=tokens_in(side) if tokens is None else tokens,
        head_count=pool.heads if head_count is None else head_count,
    )
    run(launch, pool.device)


def scatter_pages(
    staging: torch.Tensor,
    pool: KVPool,
    pages: torch.Tensor,
    *,
    tokens: int | None = None,
    first: int = 0,
    head: int = 0,
    head_count: int | None = None,
) -> None:
    """Copy the front of `staging` to tokens [first, first + tokens) of `pages`, which are distinct: undoes a gather."""
    side = Paged(pool, pages, first, head)
    launch = plan(
        Staged(staging),
        side,
        tokens=tokens_in(side) if tokens is None else tokens,
        head_count=pool.heads if head_count is None else head_count,
    )
    run(launch, pool.device)


def gather_pages_moved_bytes(pool: KVPool, *, tokens: int, head_count: int | None = None) -> int:
    """Bytes that `gather_pages` reads plus those that it writes; the page list does not count."""
    return 2 * staging_bytes(pool, tokens=tokens, head_count=head_count)


def scatter_pages_moved_bytes(pool: KVPool, *, tokens: int, head_count: int | None = None) -> int:
    """Bytes that `scatter_pages` reads plus those that it writes; the page list does not count."""
    return 2 * staging_bytes(pool, tokens=tokens, head_count=head_count)
