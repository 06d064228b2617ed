"""Which KV heads move between ranks, against a model of who holds what; and the copy of just these heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.copy import copy_pages
from sglang_prefillshare.handoff.pool import PoolView
from sglang_prefillshare.handoff.ranks import HeadSlice, Rank, heads_of, slice_between

WIDTHS = (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("width", "total", "held"),
    [
        (1, 2, [[0, 1]]),
        (2, 2, [[0], [1]]),
        (2, 8, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        (4, 2, [[0], [0], [1], [1]]),
        (2, 1, [[0], [0]]),
    ],
)
def test_heads_are_divided_as_sglang_divides_them(width: int, total: int, held: list[list[int]]) -> None:
    assert [list(heads_of(Rank(index, width), total)) for index in range(width)] == held


@pytest.mark.parametrize(
    ("rank", "total", "message"),
    [
        (Rank(0, 2), 3, "3 KV heads cannot be divided among 2 ranks"),
        (Rank(2, 2), 4, "rank 2"),
        (Rank(), 0, "0 KV heads"),
    ],
)
def test_heads_that_cannot_be_divided_are_refused(rank: Rank, total: int, message: str) -> None:
    with pytest.raises(HandoffError, match=message):
        heads_of(rank, total)


def test_ranks_that_do_not_fit_are_refused() -> None:
    with pytest.raises(HandoffError, match="prefill has 2 tensor-parallel ranks, decode 3"):
        slice_between(Rank(0, 2), Rank(0, 3), total=6, page_size=1)
    with pytest.raises(HandoffError, match="rank 0 of 2 holds no KV head of rank 1 of 2"):
        slice_between(Rank(0, 2), Rank(1, 2), total=2, page_size=1)


@given(st.data())
def test_every_head_arrives_where_it_belongs_and_nothing_else_changes(data: st.DataObject) -> None:
    """Each rank of decode copies from those of prefill that SGLang names, and then holds its heads of every row."""
    prefill, decode, total = (data.draw(st.sampled_from(WIDTHS)) for _ in range(3))
    page_size, head_bytes, pages = data.draw(st.sampled_from((1, 4))), data.draw(st.sampled_from((1, 8, 24))), 6
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    whole = rng.integers(1, 256, (2, pages, page_size, total, head_bytes), dtype=np.uint8)
    moved = rng.permutation(pages)[:3].astype(np.int32)
    onto = rng.permutation(pages)[:3].astype(np.int32)

    def pool_of(buffers: np.ndarray) -> PoolView:
        row = buffers[0, 0].nbytes
        return PoolView.at([buffer.ctypes.data for buffer in buffers], [row, row], pages, owner=buffers)

    sources = []
    for index in range(prefill):
        sources.append(np.ascontiguousarray(whole[:, :, :, list(heads_of(Rank(index, prefill), total))]))
    for index in range(decode):
        mine = Rank(index, decode)
        held = list(heads_of(mine, total))
        target = np.zeros((2, pages, page_size, len(held), head_bytes), np.uint8)
        if prefill >= decode:
            peers = range(index * prefill // decode, (index + 1) * prefill // decode)
        else:
            peers = range(index * prefill // decode, index * prefill // decode + 1)
        for peer in peers:
            heads = slice_between(Rank(peer, prefill), mine, total=total, page_size=page_size)
            copy_pages(pool_of(sources[peer]), pool_of(target), moved, onto, heads)
        wanted = np.zeros_like(target)
        wanted[:, onto] = whole[:, moved][:, :, :, held]
        assert np.array_equal(target, wanted)


def test_pools_whose_heads_differ_in_size_are_refused() -> None:
    source, target = np.zeros((2, 32), np.uint8), np.zeros((2, 24), np.uint8)
    pages = np.zeros(1, np.int32)
    views = [PoolView.at([buffer.ctypes.data], [buffer.shape[1]], 2, owner=buffer) for buffer in (source, target)]
    with pytest.raises(HandoffError, match="for 2 and 1 heads"):
        copy_pages(views[0], views[1], pages, pages, HeadSlice(1, 2, 1, 0, 0, 1))
