"""`handoff/pool.py`: where pages lie, and which of them may be copied onto which."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.pool import PageList, PoolView, check_copy, check_pages


def pages(numbers: Sequence[int]) -> PageList:
    return np.asarray(numbers, dtype=np.int32)


def view(page_bytes: Sequence[int], page_count: int) -> PoolView:
    """A view of memory that is not there: checking a copy must not touch it."""
    return PoolView.at([4096 * (i + 1) for i in range(len(page_bytes))], page_bytes, page_count, owner=None)


# ---- views ---------------------------------------------------------------------------------------------------------


def test_a_view_of_tensors_finds_every_page_where_the_tensor_keeps_it() -> None:
    buffers = [
        torch.zeros(5, 16, 2, 4, dtype=torch.bfloat16),
        torch.zeros(5, 3, dtype=torch.float32),
        torch.zeros(5, dtype=torch.uint8),
    ]
    pool = PoolView.of_tensors(buffers)
    assert (pool.page_count, pool.page_bytes.tolist(), pool.bytes_per_page) == (5, [256, 12, 1], 269)
    assert pool.addresses.dtype == pool.page_bytes.dtype == np.int64
    for buffer, address, size in zip(buffers, pool.addresses, pool.page_bytes, strict=True):
        for page in range(5):
            assert buffer[page].data_ptr() == address + page * size


def test_a_view_of_a_part_of_a_tensor_begins_at_that_part() -> None:
    buffer = torch.zeros(8, 3, dtype=torch.int16)
    part = PoolView.of_tensors([buffer[2:6]])
    assert (part.addresses.tolist(), part.page_count) == ([buffer[2].data_ptr()], 4)


@pytest.mark.parametrize(
    "buffers",
    [
        [torch.zeros(4, 6).t()],
        [torch.zeros(4, 6)[:, :3]],
        [torch.zeros(4, 6)[::2]],
        [torch.zeros(4, 6), torch.zeros(5, 6)],
        [torch.zeros(4, 6), torch.zeros(6, 4).t()],
    ],
    ids=["transposed", "columns", "every second page", "two page counts", "one of two transposed"],
)
def test_tensors_whose_pages_do_not_lie_side_by_side_are_refused(buffers: list[torch.Tensor]) -> None:
    with pytest.raises(HandoffError, match="contiguous and of one page count"):
        PoolView.of_tensors(buffers)


def test_as_many_page_sizes_as_buffers_are_wanted() -> None:
    with pytest.raises(HandoffError, match="a pool has 2 buffers and 3 page sizes"):
        PoolView.at([4096, 8192], [1, 2, 3], 10, owner=None)


def test_addresses_beyond_4_gib_are_kept_whole() -> None:
    addresses = [0x7F00_0000_0000 + i for i in range(3)]
    assert PoolView.at(addresses, [1, 1, 1], 2**31 - 1, owner=None).addresses.tolist() == addresses


def test_memory_stays_mapped_for_as_long_as_a_view_of_it_lives() -> None:
    buffer = torch.full((3, 2), 7, dtype=torch.uint8)
    alive = weakref.ref(buffer)
    pool = PoolView.of_tensors([buffer])
    del buffer
    assert alive() is not None
    del pool
    assert alive() is None


# ---- what may be copied --------------------------------------------------------------------------------------------


@given(numbers=st.lists(st.integers(-3, 12)), page_count=st.integers(0, 10))
def test_pages_outside_the_pool_are_refused(numbers: list[int], page_count: int) -> None:
    if all(0 <= number < page_count for number in numbers):
        check_pages(pages(numbers), page_count, whose="decode")
        return
    message = rf"decode names page {min(numbers)}\.\.{max(numbers)} of a pool with {page_count} pages"
    with pytest.raises(HandoffError, match=message):
        check_pages(pages(numbers), page_count, whose="decode")


def test_pages_of_pools_of_one_page_size_can_be_copied_between_pools_of_any_page_count() -> None:
    check_copy(view([64, 2], 3), view([64, 2], 300), pages([2, 0, 2]), pages([299, 0, 7]))
    check_copy(view([64], 0), view([64], 0), pages([]), pages([]))


@pytest.mark.parametrize(
    ("source", "target", "from_pages", "onto_pages", "message"),
    [
        (view([8], 4), view([8], 4), [0, 1], [0], "2 source pages for 1 target pages"),
        (view([8], 4), view([8], 4), [], [0], "0 source pages for 1 target pages"),
        (view([8], 4), view([9], 4), [0], [0], r"source pages have \[8\] bytes per buffer, target pages \[9\]"),
        (view([8, 4], 4), view([4, 8], 4), [0], [0], r"\[8, 4\] bytes per buffer, target pages \[4, 8\]"),
        (view([8], 4), view([8, 8], 4), [0], [0], r"\[8\] bytes per buffer, target pages \[8, 8\]"),
        (view([8], 4), view([8], 9), [0, 4], [0, 4], r"the source names page 0\.\.4 of a pool with 4 pages"),
        (view([8], 9), view([8], 4), [0, 4], [0, 4], r"the target names page 0\.\.4 of a pool with 4 pages"),
        (view([8], 4), view([8], 4), [-1], [0], r"the source names page -1\.\.-1"),
        (view([8], 4), view([8], 4), [0], [-1], r"the target names page -1\.\.-1"),
    ],
)
def test_a_copy_that_does_not_fit_is_refused(
    source: PoolView, target: PoolView, from_pages: list[int], onto_pages: list[int], message: str
) -> None:
    with pytest.raises(HandoffError, match=message):
        check_copy(source, target, pages(from_pages), pages(onto_pages))
