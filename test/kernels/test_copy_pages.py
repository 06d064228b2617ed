"""`copy_pages` and its torch reference against a loop over bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from prefillshare_kernels.copy_pages import copy_pages, copy_pages_moved_bytes
from prefillshare_kernels.pool import KVPool
from prefillshare_kernels.reference import copy_pages_reference
from test.kernels.pools import MODELS, Case, Guarded, Shape, cases, copied


def check_copy(case: Case, device: torch.device) -> None:
    source, target = Guarded(case.source, device, seed=1), Guarded(case.target, device, seed=2)
    before, expected = source.bytes(), copied(case, source, target)
    source_pages, target_pages = case.page_lists(device)
    copy_pages(
        source.pool(),
        target.pool(),
        source_pages,
        target_pages,
        tokens=case.tokens,
        source_first=case.source_first,
        target_first=case.target_first,
        source_head=case.source_head,
        target_head=case.target_head,
        head_count=case.head_count,
    )
    assert target.bytes() == expected
    assert source.bytes() == before


def check_reference(case: Case, device: torch.device) -> None:
    source, target = Guarded(case.source, device, seed=1), Guarded(case.target, device, seed=2)
    expected = copied(case, source, target)
    copy_pages_reference(
        source.buffers,
        target.buffers,
        *case.page_lists(device),
        source_page_size=case.source.page_size,
        target_page_size=case.target.page_size,
        tokens=case.tokens,
        source_first=case.source_first,
        target_first=case.target_first,
        source_head=case.source_head,
        target_head=case.target_head,
        head_count=case.head_count,
    )
    assert target.bytes() == expected


@settings(deadline=None, max_examples=200)
@given(case=cases())
def test_tokens_arrive_as_if_copied_byte_by_byte_and_nothing_else_changes(device: torch.device, case: Case) -> None:
    check_copy(case, device)


@settings(deadline=None, max_examples=200)
@given(case=cases())
def test_the_reference_copies_the_same_bytes(device: torch.device, case: Case) -> None:
    check_reference(case, device)


@pytest.mark.parametrize("model", MODELS)
def test_pages_of_real_models_arrive(device: torch.device, model: str) -> None:
    check_copy(MODELS[model], device)
    check_reference(MODELS[model], device)


def test_without_counts_whole_pages_of_all_heads_move(device: torch.device) -> None:
    shapes = [Shape(torch.bfloat16, (8, 8), 2, page_size, 6) for page_size in (4, 3)]
    case = Case(*shapes, tokens=8, source_pages=(5, 0), target_pages=(3, 1, 4), head_count=2)
    source, target = (Guarded(shape, device, seed=seed) for seed, shape in enumerate(shapes))
    expected = copied(case, source, target)
    copy_pages(source.pool(), target.pool(), *case.page_lists(device))
    assert target.bytes() == expected


def test_no_tokens_are_no_launch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(torch.float16, (8,), 1, 16, 1)
    source, target = (Guarded(shape, device, seed=seed) for seed in (1, 2))
    none = torch.zeros(0, dtype=torch.int32, device=device)
    monkeypatch.setattr("prefillshare_kernels.rows.copy_rows", None)
    copy_pages(source.pool(), target.pool(), none, none)


def test_pages_can_move_within_one_pool(device: torch.device) -> None:
    shape = Shape(torch.float16, (8, 8), 2, 4, 4)
    case = Case(shape, shape, tokens=8, source_pages=(3, 1), target_pages=(0, 2), head_count=2)
    pool = Guarded(shape, device, seed=1)
    expected = copied(case, pool, pool)
    copy_pages(pool.pool(), pool.pool(), *case.page_lists(device))
    assert pool.bytes() == expected


def test_rows_beyond_two_billion_words_are_reached(device: torch.device) -> None:
    row_bytes, page = 4_097, 600_000  # an odd width: words of one byte, the last page 2.5e9 of them away
    size = row_bytes * (page + 1)
    space = torch.empty(size, dtype=torch.uint8, device=device)  # of which host memory backs only what is touched
    row = torch.randint(256, (2, row_bytes), dtype=torch.uint8)
    small = row.to(device)
    far = KVPool((space.data_ptr(),), (row_bytes,), page_size=1, page_count=page + 1, device=device)
    near = KVPool.from_tensors([small], page_size=1)
    first, last = (torch.tensor([number], dtype=torch.int32, device=device) for number in (0, page))
    copy_pages(near, far, first, last)
    assert torch.equal(space[-row_bytes:].cpu(), row[0])
    copy_pages(far, near, last, first + 1)
    assert torch.equal(small.cpu(), row[[0, 0]])


def test_moved_bytes_count_reads_and_writes() -> None:
    pool = Guarded(Shape(torch.bfloat16, (128,) * 64, 8, 1, 2), torch.device("cpu"), seed=1).pool()
    assert copy_pages_moved_bytes(pool, tokens=10) == 2 * 10 * 131_072  # Llama-3.1-8B: 128 KiB a token
    assert copy_pages_moved_bytes(pool, tokens=10, head_count=2) == 2 * 10 * 32_768
