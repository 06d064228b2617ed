"""`gather_pages`, `scatter_pages` and their torch references against a loop over bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from prefillshare_kernels.reference import gather_pages_reference, scatter_pages_reference
from prefillshare_kernels.staging import (
    gather_pages,
    gather_pages_moved_bytes,
    scatter_pages,
    scatter_pages_moved_bytes,
    staging_bytes,
)
from test.kernels.pools import MODELS, Case, Guarded, Shape, cases, copied, gathered

GUARD = 32


def check_staged(case: Case, device: torch.device) -> None:
    source, target = Guarded(case.source, device, seed=1), Guarded(case.target, device, seed=2)
    before, expected, wanted = source.bytes(), copied(case, source, target), gathered(case, source)
    source_pages, target_pages = case.page_lists(device)
    size = staging_bytes(source.pool(), tokens=case.tokens, head_count=case.head_count)
    assert size == len(wanted)
    space = torch.full((size + GUARD + case.source.shift,), 0xA5, dtype=torch.uint8, device=device)
    staging = space[case.source.shift :]

    gather_pages(
        source.pool(),
        source_pages,
        staging,
        tokens=case.tokens,
        first=case.source_first,
        head=case.source_head,
        head_count=case.head_count,
    )
    assert bytes(space.cpu().numpy().tobytes()) == b"\xa5" * case.source.shift + wanted + b"\xa5" * GUARD

    scatter_pages(
        staging,
        target.pool(),
        target_pages,
        tokens=case.tokens,
        first=case.target_first,
        head=case.target_head,
        head_count=case.head_count,
    )
    assert target.bytes() == expected
    assert source.bytes() == before


def check_reference(case: Case, device: torch.device) -> None:
    source, target = Guarded(case.source, device, seed=1), Guarded(case.target, device, seed=2)
    expected, wanted = copied(case, source, target), gathered(case, source)
    source_pages, target_pages = case.page_lists(device)
    staging = gather_pages_reference(
        source.buffers,
        source_pages,
        page_size=case.source.page_size,
        tokens=case.tokens,
        first=case.source_first,
        head=case.source_head,
        head_count=case.head_count,
    )
    assert bytes(staging.cpu().numpy().tobytes()) == wanted
    scatter_pages_reference(
        staging,
        target.buffers,
        target_pages,
        page_size=case.target.page_size,
        tokens=case.tokens,
        first=case.target_first,
        head=case.target_head,
        head_count=case.head_count,
    )
    assert target.bytes() == expected


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_staged_tokens_arrive_as_if_copied_byte_by_byte(device: torch.device, case: Case) -> None:
    check_staged(case, device)


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_the_references_stage_the_same_bytes(device: torch.device, case: Case) -> None:
    check_reference(case, device)


@pytest.mark.parametrize("model", MODELS)
def test_pages_of_real_models_arrive(device: torch.device, model: str) -> None:
    check_staged(MODELS[model], device)
    check_reference(MODELS[model], device)


def test_a_staging_buffer_is_laid_out_as_buffers_of_tokens(device: torch.device) -> None:
    buffers = [torch.arange(12, dtype=torch.int32, device=device).view(6, 2, 1) + 100 * number for number in range(2)]
    pages = torch.tensor([2, 0], device=device)
    staged = gather_pages_reference(buffers, pages, page_size=2, tokens=3, head=1, head_count=1)
    assert staged.view(torch.int32).tolist() == [9, 11, 1, 109, 111, 101]


def test_moved_bytes_count_reads_and_writes() -> None:
    pool = Guarded(Shape(torch.bfloat16, (576,) * 27, 1, 64, 1), torch.device("cpu"), seed=1).pool()
    for moved in (gather_pages_moved_bytes, scatter_pages_moved_bytes):
        assert moved(pool, tokens=10) == 2 * 10 * 27 * 1152


@pytest.mark.parametrize(
    ("staging", "message"),
    [
        (torch.zeros(63, dtype=torch.uint8), "has 63 bytes, wanted 64"),
        (torch.zeros(64, dtype=torch.bfloat16), r"is torch.bfloat16 \(64,\)"),
        (torch.zeros(128, dtype=torch.uint8)[::2], r"strides \(2,\), wanted contiguous"),
        (torch.zeros(64, dtype=torch.uint8, device="meta"), "is on meta, the pool on cpu"),
    ],
)
def test_an_unfit_staging_buffer_is_refused(staging: torch.Tensor, message: str) -> None:
    pool = Guarded(Shape(torch.bfloat16, (8,), 2, 2, 1), torch.device("cpu"), seed=1).pool()
    pages = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        gather_pages(pool, pages, staging)
    with pytest.raises(ValueError, match=message):
        scatter_pages(staging, pool, pages)
