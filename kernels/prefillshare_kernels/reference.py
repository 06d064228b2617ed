"""The operations in plain torch: slow, obvious, on any device. For tests and as a benchmark's baseline.

Pools are here lists of contiguous tensors [slots, heads, head_dim], of one dtype or several. Arguments mean what they
mean in `copy_pages` and `staging`; they are not checked.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def slots_of(pages: torch.Tensor, *, page_size: int, first: int, tokens: int) -> torch.Tensor:
    """Slots of tokens [first, first + tokens) of a page list: int64 [tokens]."""
    token = torch.arange(first, first + tokens, device=pages.device)
    return pages.long()[token // page_size] * page_size + token % page_size


def copy_pages_reference(
    source: Sequence[torch.Tensor],
    target: Sequence[torch.Tensor],
    source_pages: torch.Tensor,
    target_pages: torch.Tensor,
    *,
    source_page_size: int,
    target_page_size: int,
    tokens: int,
    source_first: int = 0,
    target_first: int = 0,
    source_head: int = 0,
    target_head: int = 0,
    head_count: int | None = None,
) -> None:
    """Copy `tokens` tokens from pool to pool. `head_count` is by default all heads of the source."""
    read = slots_of(source_pages, page_size=source_page_size, first=source_first, tokens=tokens)
    written = slots_of(target_pages, page_size=target_page_size, first=target_first, tokens=tokens)
    for src, dst in zip(source, target, strict=True):
        heads = src.shape[1] if head_count is None else head_count
        rows = _bytes(src).index_select(0, read)[:, source_head : source_head + heads]
        if heads == dst.shape[1]:
            _bytes(dst).index_copy_(0, written, rows)
        else:
            _bytes(dst)[written, target_head : target_head + heads] = rows


def gather_pages_reference(
    source: Sequence[torch.Tensor],
    pages: torch.Tensor,
    *,
    page_size: int,
    tokens: int,
    first: int = 0,
    head: int = 0,
    head_count: int | None = None,
) -> torch.Tensor:
    """The staging buffer that `gather_pages` fills: uint8 [bytes], [buffer][token][head_count heads]."""
    read = slots_of(pages, page_size=page_size, first=first, tokens=tokens)
    parts = []
    for src in source:
        heads = src.shape[1] if head_count is None else head_count
        parts.append(_bytes(src).index_select(0, read)[:, head : head + heads].flatten())
    return torch.cat(parts)


def scatter_pages_reference(
    staging: torch.Tensor,
    target: Sequence[torch.Tensor],
    pages: torch.Tensor,
    *,
    page_size: int,
    tokens: int,
    first: int = 0,
    head: int = 0,
    head_count: int | None = None,
) -> None:
    """Copy the front of `staging`, uint8 [bytes], to tokens [first, first + tokens) of `pages`."""
    written = slots_of(pages, page_size=page_size, first=first, tokens=tokens)
    start = 0
    for dst in target:
        heads = dst.shape[1] if head_count is None else head_count
        head_bytes = _bytes(dst).shape[2]
        part = staging[start : start + tokens * heads * head_bytes]
        _bytes(dst)[written, head : head + heads] = part.view(tokens, heads, head_bytes)
        start += part.numel()


def _bytes(buffer: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 [slots, heads, bytes of a head]: no arithmetic type, so NaNs keep their payload."""
    return buffer.view(torch.uint8)
