"""Which KV heads lie where, for workers of several tensor-parallel ranks, and which of them move between two ranks.

A rank's row holds its heads side by side. With at most as many ranks as heads each rank holds an equal run of them;
with more, each head lies on several ranks that follow one another. SGLang's loaders divide attention in this way.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from sglang_prefillshare.errors import HandoffError


class Rank(msgspec.Struct, frozen=True):
    """Rank `index` of the `width` that a worker has."""

    index: int = 0
    width: int = 1


@dataclass(frozen=True, slots=True)
class HeadSlice:
    """Heads [source_first, source_first + count) of a source row, which go to those from `target_first` on.

    A row is the KV of one token in one buffer: `source_heads` heads in the source, `target_heads` in the target, all of
    one size; a page is `page_size` rows.
    """

    page_size: int
    source_heads: int
    target_heads: int
    source_first: int
    target_first: int
    count: int


def heads_of(rank: Rank, total: int) -> range:
    """The heads, of `total` in the model, that a rank holds. Raises `HandoffError` if they cannot be divided so."""
    if total < 1 or not 0 <= rank.index < rank.width or max(total, rank.width) % min(total, rank.width):
        raise HandoffError(f"{total} KV heads cannot be divided among {rank.width} ranks (rank {rank.index}).")
    if rank.width <= total:
        held = total // rank.width
        return range(rank.index * held, (rank.index + 1) * held)
    head = rank.index // (rank.width // total)
    return range(head, head + 1)


def slice_between(source: Rank, target: Rank, *, total: int, page_size: int) -> HeadSlice | None:
    """What `target` takes of `source`'s rows; None where it is the whole row, and pages move as they are.

    Raises `HandoffError` where the two hold no head in common, or where neither width divides the other.
    """
    if max(source.width, target.width) % min(source.width, target.width):
        raise HandoffError(
            f"prefill has {source.width} tensor-parallel ranks, decode {target.width}. Choose --tp-size so that one "
            "divides the other."
        )
    theirs, ours = heads_of(source, total), heads_of(target, total)
    common = range(max(theirs.start, ours.start), min(theirs.stop, ours.stop))
    if not common:
        raise HandoffError(
            f"rank {source.index} of {source.width} holds no KV head of rank {target.index} of {target.width}."
        )
    if theirs == ours:
        return None
    return HeadSlice(
        page_size=page_size,
        source_heads=len(theirs),
        target_heads=len(ours),
        source_first=common.start - theirs.start,
        target_first=common.start - ours.start,
        count=len(common),
    )
