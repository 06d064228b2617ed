"""`handoff/copy.py` against a loop that copies page by page."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.copy import PageList, check_pages, contiguous_runs, copy_pages

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64)


def pages(numbers: Sequence[int]) -> PageList:
    return np.asarray(numbers, dtype=np.int32)


def pool(page_count: int, page_shapes: Sequence[int], dtype: torch.dtype, *, seed: int) -> list[torch.Tensor]:
    """Buffers of `dtype` as uint8 rows, one per page; every byte value occurs, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    rows = [
        torch.randint(256, (page_count, shape * dtype.itemsize), generator=generator, dtype=torch.uint8)
        for shape in page_shapes
    ]
    return [row.view(dtype).view(torch.uint8) for row in rows]


def copied_one_by_one(
    source: Sequence[torch.Tensor], target: Sequence[torch.Tensor], source_pages: PageList, target_pages: PageList
) -> list[torch.Tensor]:
    expected = [buffer.clone() for buffer in target]
    for k in range(len(source_pages)):
        for src, dst in zip(source, expected, strict=True):
            for byte in range(src.shape[1]):
                dst[int(target_pages[k]), byte] = src[int(source_pages[k]), byte]
    return expected


@st.composite
def mappings(draw: st.DrawFn) -> tuple[int, int, list[int], list[int]]:
    """Sizes of two pools, and pages of one for pages of the other: pieces of runs, in any order.

    Target pages are distinct, as an allocator's are; a source page may serve several.
    """
    source_count, target_count = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    free = list(range(target_count))
    is_shuffled: bool = draw(st.booleans())
    if is_shuffled:
        free = draw(st.permutations(free))
    source: list[int] = []
    target: list[int] = []
    for _ in range(draw(st.integers(0, 8))):
        if not free:
            break
        length = draw(st.integers(1, min(len(free), source_count)))
        start = draw(st.integers(0, source_count - length))
        source += range(start, start + length)
        target += free[:length]
        free = free[draw(st.integers(length, len(free))) :]
    return source_count, target_count, source, target


@settings(deadline=None, max_examples=150)
@given(mapping=mappings(), dtype=st.sampled_from(DTYPES), shapes=st.lists(st.integers(1, 3), min_size=1, max_size=3))
def test_pages_arrive_as_if_copied_one_by_one_and_no_other_page_changes(
    mapping: tuple[int, int, list[int], list[int]], dtype: torch.dtype, shapes: list[int]
) -> None:
    source_count, target_count, from_pages, onto_pages = mapping
    source = pool(source_count, shapes, dtype, seed=1)
    target = pool(target_count, shapes, dtype, seed=2)
    before = [buffer.clone() for buffer in source]
    expected = copied_one_by_one(source, target, pages(from_pages), pages(onto_pages))

    copy_pages(source, target, pages(from_pages), pages(onto_pages))

    assert all(torch.equal(found, wanted) for found, wanted in zip(target, expected, strict=True))
    assert all(torch.equal(found, wanted) for found, wanted in zip(source, before, strict=True))


@pytest.mark.parametrize(
    ("from_pages", "onto_pages"),
    [
        (range(100), range(100, 200)),  # one run
        (range(99, -1, -1), range(100)),  # as many runs as pages: the indexed copy
        ([*range(50), *range(50)], range(100)),  # a run that is there twice
        ([*range(10, 60), *range(50)], [*range(60, 110), *range(50)]),  # runs that overlap in the source
        (range(0, 200, 2), range(1, 201, 2)),
    ],
)
def test_both_ways_to_copy_are_exact(from_pages: Sequence[int], onto_pages: Sequence[int]) -> None:
    source, target = (pool(201, [3, 1], torch.bfloat16, seed=seed) for seed in (1, 2))
    expected = copied_one_by_one(source, target, pages(from_pages), pages(onto_pages))
    copy_pages(source, target, pages(from_pages), pages(onto_pages))
    assert all(torch.equal(found, wanted) for found, wanted in zip(target, expected, strict=True))


def test_copying_no_pages_changes_nothing() -> None:
    source, target = (pool(3, [2], torch.float32, seed=seed) for seed in (1, 2))
    before = target[0].clone()
    copy_pages(source, target, pages([]), pages([]))
    assert torch.equal(target[0], before)


def test_lists_of_different_length_are_refused() -> None:
    source, target = (pool(3, [2], torch.float32, seed=seed) for seed in (1, 2))
    before = target[0].clone()
    with pytest.raises(HandoffError, match="2 source pages for 1 target pages"):
        copy_pages(source, target, pages([0, 1]), pages([0]))
    assert torch.equal(target[0], before)


@pytest.mark.parametrize(
    ("from_pages", "onto_pages", "runs"),
    [
        ([], [], []),
        ([5], [9], [(5, 9, 1)]),
        ([5, 6, 7], [1, 2, 3], [(5, 1, 3)]),
        ([5, 6, 7], [1, 2, 4], [(5, 1, 2), (7, 4, 1)]),  # the target breaks
        ([5, 7, 8], [1, 2, 3], [(5, 1, 1), (7, 2, 2)]),  # the source breaks
        ([3, 2, 1], [1, 2, 3], [(3, 1, 1), (2, 2, 1), (1, 3, 1)]),
        ([4, 4], [1, 2], [(4, 1, 1), (4, 2, 1)]),
    ],
)
def test_runs_are_contiguous_on_both_sides(from_pages: Any, onto_pages: Any, runs: list[tuple[int, int, int]]) -> None:
    assert contiguous_runs(pages(from_pages), pages(onto_pages)) == runs


@given(mapping=mappings())
def test_runs_are_the_mapping_and_none_could_be_longer(mapping: tuple[int, int, list[int], list[int]]) -> None:
    _, _, from_pages, onto_pages = mapping
    runs = contiguous_runs(pages(from_pages), pages(onto_pages))
    assert [first + i for first, _, length in runs for i in range(length)] == from_pages
    assert [onto + i for _, onto, length in runs for i in range(length)] == onto_pages
    for (first, onto, length), (next_first, next_onto, _) in pairwise(runs):
        assert (first + length, onto + length) != (next_first, next_onto)


@given(numbers=st.lists(st.integers(-3, 12)), page_count=st.integers(0, 10))
def test_pages_outside_the_pool_are_refused(numbers: list[int], page_count: int) -> None:
    if all(0 <= number < page_count for number in numbers):
        check_pages(pages(numbers), page_count, whose="decode")
        return
    message = rf"decode names page {min(numbers)}\.\.{max(numbers)} of a pool with {page_count} pages"
    with pytest.raises(HandoffError, match=message):
        check_pages(pages(numbers), page_count, whose="decode")
