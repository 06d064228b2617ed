"""`handoff/copy.py` against a loop that copies page by page."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.copy import contiguous_runs, copy_pages, warm_up
from sglang_prefillshare.handoff.memory import SharedRegion
from sglang_prefillshare.handoff.pool import PageList, PoolView

Bytes = npt.NDArray[np.uint8]


def pages(numbers: Sequence[int]) -> PageList:
    return np.asarray(numbers, dtype=np.int32)


def random_bytes(page_count: int, page_bytes: Sequence[int], *, seed: int) -> list[Bytes]:
    """What a pool holds: one row per page in each buffer."""
    random = np.random.default_rng(seed)
    return [random.integers(256, size=(page_count, size), dtype=np.uint8) for size in page_bytes]


def view(buffers: Sequence[Bytes]) -> PoolView:
    return PoolView.of_tensors([torch.from_numpy(buffer) for buffer in buffers])


def copied_one_by_one(
    source: Sequence[Bytes], target: Sequence[Bytes], from_pages: Sequence[int], onto_pages: Sequence[int]
) -> list[Bytes]:
    expected = [buffer.copy() for buffer in target]
    for page, onto in zip(from_pages, onto_pages, strict=True):
        for from_buffer, onto_buffer in zip(source, expected, strict=True):
            onto_buffer[onto] = from_buffer[page]
    return expected


def are_equal(found: Sequence[Bytes], wanted: Sequence[Bytes]) -> bool:
    return all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


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
@given(mapping=mappings(), page_bytes=st.lists(st.integers(1, 200), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_pages_arrive_as_if_copied_one_by_one_and_no_other_page_changes(
    mapping: tuple[int, int, list[int], list[int]], page_bytes: list[int], seed: int
) -> None:
    source_count, target_count, from_pages, onto_pages = mapping
    source = random_bytes(source_count, page_bytes, seed=seed)
    target = random_bytes(target_count, page_bytes, seed=seed + 1)
    before = [buffer.copy() for buffer in source]
    expected = copied_one_by_one(source, target, from_pages, onto_pages)

    copy_pages(view(source), view(target), pages(from_pages), pages(onto_pages))

    assert are_equal(target, expected)
    assert are_equal(source, before)


@pytest.mark.parametrize("page_bytes", [[1], [64], [384, 384], [1500, 63, 1024, 8192]])
@pytest.mark.parametrize(
    ("from_pages", "onto_pages"),
    [
        (range(100), range(100, 200)),  # one run
        (range(99, -1, -1), range(100)),  # as many runs as pages
        ([*range(50), *range(50)], range(100)),  # a run that is there twice
        ([*range(10, 60), *range(50)], [*range(60, 110), *range(50)]),  # runs that overlap in the source
        (range(0, 200, 2), range(1, 201, 2)),
        (range(0, 16, 2), range(8)),  # as many runs as are asked for ahead
        (range(0, 18, 2), range(9)),  # and one more
        ([*range(0, 180, 20), *range(100, 200)], [*range(0, 18, 2), *range(101, 201)]),  # a long run comes last
    ],
    ids=["one", "backwards", "twice", "overlapping", "every second", "eight runs", "nine runs", "a long one last"],
)
def test_runs_of_any_number_and_length_are_copied_exactly(
    page_bytes: list[int], from_pages: Sequence[int], onto_pages: Sequence[int]
) -> None:
    source, target = (random_bytes(201, page_bytes, seed=seed) for seed in (1, 2))
    expected = copied_one_by_one(source, target, from_pages, onto_pages)
    copy_pages(view(source), view(target), pages(from_pages), pages(onto_pages))
    assert are_equal(target, expected)


@pytest.mark.parametrize("seed", range(5))
def test_scattered_pages_of_buffers_of_different_page_sizes_are_copied_exactly(seed: int) -> None:
    page_bytes = [384, 1, 8192, 1023, 64]
    source, target = random_bytes(700, page_bytes, seed=seed), random_bytes(500, page_bytes, seed=seed + 100)
    random = np.random.default_rng(seed)
    from_pages, onto_pages = random.permutation(700)[:400].tolist(), random.permutation(500)[:400].tolist()
    assert len(contiguous_runs(pages(from_pages), pages(onto_pages))) > 300
    expected = copied_one_by_one(source, target, from_pages, onto_pages)
    copy_pages(view(source), view(target), pages(from_pages), pages(onto_pages))
    assert are_equal(target, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_every_bit_of_a_float_arrives_even_of_one_that_is_no_number(dtype: torch.dtype) -> None:
    source = torch.from_numpy(random_bytes(256, [4 * dtype.itemsize], seed=3)[0]).view(dtype)
    target = torch.zeros_like(source)
    copy_pages(PoolView.of_tensors([source]), PoolView.of_tensors([target]), pages(range(256)), pages(range(256)))
    assert torch.isnan(source.float()).any()
    assert torch.equal(target.view(torch.uint8), source.view(torch.uint8))


def test_pages_are_read_from_a_mapping_that_cannot_be_written_up_to_its_last_byte() -> None:
    page_bytes, page_count = [384, 640], 64  # 16 pages of memory, filled exactly
    offsets = [0, page_bytes[0] * page_count]
    owned = SharedRegion.create(sum(page_bytes) * page_count, name="test-copy")
    source = random_bytes(page_count, page_bytes, seed=4)
    owned.tensor(0, (owned.handle.size,), torch.uint8).copy_(
        torch.from_numpy(np.concatenate([buffer.reshape(-1) for buffer in source]))
    )
    mapped = SharedRegion.attach(owned.handle)
    with pytest.raises(TypeError, match="readonly"):
        mapped._mapping[0] = 0
    peer = PoolView.at([mapped.address + offset for offset in offsets], page_bytes, page_count, owner=mapped)

    target = random_bytes(page_count, page_bytes, seed=5)
    order = np.random.default_rng(6).permutation(page_count).tolist()
    copy_pages(peer, view(target), pages(order), pages(range(page_count)))

    assert are_equal(target, copied_one_by_one(source, target, order, range(page_count)))


def test_nothing_before_the_first_or_behind_the_last_page_is_written() -> None:
    margin, page_bytes, page_count = 512, 48, 40
    memory = np.frombuffer(mmap.mmap(-1, 2 * margin + page_bytes * page_count), np.uint8)
    memory[:] = 255
    target = PoolView.at([memory.ctypes.data + margin], [page_bytes], page_count, owner=memory)
    source = random_bytes(page_count, [page_bytes], seed=7)
    copy_pages(view(source), target, pages(range(page_count)), pages(range(page_count - 1, -1, -1)))
    assert (memory[:margin] == 255).all() and (memory[-margin:] == 255).all()
    assert np.array_equal(memory[margin:-margin].reshape(page_count, page_bytes), source[0][::-1])


def test_copying_no_pages_changes_nothing() -> None:
    source, target = (random_bytes(3, [8], seed=seed) for seed in (1, 2))
    before = target[0].copy()
    copy_pages(view(source), view(target), pages([]), pages([]))
    assert np.array_equal(target[0], before)


@pytest.mark.parametrize(
    ("from_pages", "onto_pages", "message"),
    [
        ([0, 1], [0], "2 source pages for 1 target pages"),
        ([0, 1, 6], [0, 1, 2], "the source names page 0..6 of a pool with 6 pages"),
        ([0, 1, -1], [0, 1, 2], "the source names page -1..1 of a pool"),
        ([0, 1, 5], [0, 1, 4], "the target names page 0..4 of a pool with 4 pages"),
        ([0, 1, 2], [0, -1, 1], "the target names page -1..1 of a pool"),
        ([2**31 - 1], [0], "the source names page 2147483647"),
    ],
)
def test_pages_that_are_not_there_are_refused_before_anything_is_written(
    from_pages: list[int], onto_pages: list[int], message: str
) -> None:
    source, target = random_bytes(6, [8, 64], seed=1), random_bytes(4, [8, 64], seed=2)
    before = [buffer.copy() for buffer in target]
    with pytest.raises(HandoffError, match=message):
        copy_pages(view(source), view(target), pages(from_pages), pages(onto_pages))
    assert are_equal(target, before)


def test_pools_of_other_page_sizes_are_refused_before_anything_is_written() -> None:
    source, target = random_bytes(4, [8, 64], seed=1), random_bytes(4, [64, 8], seed=2)
    before = [buffer.copy() for buffer in target]
    with pytest.raises(HandoffError, match=r"source pages have \[8, 64\] bytes per buffer, target pages \[64, 8\]"):
        copy_pages(view(source), view(target), pages([0]), pages([0]))
    assert are_equal(target, before)


def test_page_lists_as_they_come_off_the_wire_are_taken() -> None:
    source, target = (random_bytes(20, [8], seed=seed) for seed in (1, 2))
    from_pages, onto_pages = [7, 3, 4, 19], [0, 9, 10, 2]
    lent = np.frombuffer(np.asarray(from_pages, "<i4").tobytes(), dtype="<i4")
    assert not lent.flags.writeable
    expected = copied_one_by_one(source, target, from_pages, onto_pages)
    copy_pages(view(source), view(target), lent, pages([5, *onto_pages])[1:])
    assert are_equal(target, expected)


def test_warming_up_can_be_repeated() -> None:
    warm_up()
    warm_up()


# ---- runs ----------------------------------------------------------------------------------------------------------


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
    found = contiguous_runs(pages(from_pages), pages(onto_pages))
    assert (found.dtype, found.shape) == (np.int64, (len(runs), 3))
    assert [tuple(run) for run in found.tolist()] == runs


@given(mapping=mappings())
def test_runs_are_the_mapping_and_none_could_be_longer(mapping: tuple[int, int, list[int], list[int]]) -> None:
    _, _, from_pages, onto_pages = mapping
    runs = contiguous_runs(pages(from_pages), pages(onto_pages)).tolist()
    assert [first + i for first, _, length in runs for i in range(length)] == from_pages
    assert [onto + i for _, onto, length in runs for i in range(length)] == onto_pages
    for (first, onto, length), (next_first, next_onto, _) in pairwise(runs):
        assert (first + length, onto + length) != (next_first, next_onto)
