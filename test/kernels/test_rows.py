"""What `rows.plan` decides and refuses, without a launch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from hypothesis import given
from hypothesis import strategies as st

from prefillshare_kernels import rows
from prefillshare_kernels.copy_pages import copy_pages
from prefillshare_kernels.pool import KVPool
from prefillshare_kernels.rows import LARGE, SMALL, Paged, Staged, Tuning, plan, tile

CPU = torch.device("cpu")
MANY = 1 << 16


def pool(
    *, row_bytes: int = 2048, heads: int = 8, page_size: int = 16, buffers: int = 2, address: int = 1 << 20
) -> KVPool:
    return KVPool((address,) * buffers, (row_bytes,) * buffers, page_size, MANY, CPU, heads)


def pages(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


@pytest.mark.parametrize(
    ("width_words", "word_bytes", "expected"),
    [
        (256, 8, (8, 256)),  # Llama-3.1-8B
        (48, 8, (128, 16)),  # SmolLM2
        (144, 8, (128, 16)),  # MLA
        (64, 8, (32, 64)),  # two of Llama's heads
        (82, 8, (64, 32)),  # MLA in fp8 with its scales
        (3, 8, (512, 4)),  # narrower than a cache line
        (2560, 8, (4, 512)),
        (7, 1, (256, 8)),
        (65_537, 1, (16, 128)),
    ],
)
def test_tiles_leave_few_lanes_idle(width_words: int, word_bytes: int, expected: tuple[int, int]) -> None:
    assert tile(width_words, word_bytes, LARGE.words) == expected


@given(width_words=st.integers(1, 1 << 16), word_bytes=st.sampled_from((1, 2, 4, 8)))
def test_a_tile_is_one_program_of_whole_cache_lines(width_words: int, word_bytes: int) -> None:
    tokens, columns = tile(width_words, word_bytes, LARGE.words)
    assert tokens * columns == LARGE.words
    assert columns & (columns - 1) == 0
    assert columns * word_bytes >= 128 or columns // 2 < width_words <= columns
    assert columns // 2 < width_words


@pytest.mark.parametrize(("tuning", "whole_rows", "split_rows"), [(LARGE, 6, 2 * 9), (SMALL, 21, 5 * 9)])
def test_one_launch_covers_all_tokens_columns_and_buffers(tuning: Tuning, whole_rows: int, split_rows: int) -> None:
    launch = plan(Paged(pool(), pages(3)), Paged(pool(page_size=1), pages(41)), tokens=41, head_count=8, tuning=tuning)
    assert launch is not None
    assert launch.grid == (whole_rows, 2)
    launch = plan(
        Paged(pool(row_bytes=1152, heads=1), pages(9)),
        Staged(torch.zeros(1 << 20, dtype=torch.uint8)),
        tokens=129,
        head_count=1,
        tuning=tuning,
    )
    assert launch is not None
    assert launch.grid == (split_rows, 2)


def test_a_small_copy_has_small_tiles_so_that_every_multiprocessor_has_some() -> None:
    row_bytes = 2048
    most = rows.SMALL_COPY_BYTES // (2 * row_bytes)
    for tokens, tile_words in ((most, SMALL.words), (most + 1, LARGE.words)):
        count = -(-tokens // 16)
        launch = plan(Paged(pool(), pages(count)), Paged(pool(), pages(count)), tokens=tokens, head_count=8)
        assert launch is not None
        assert launch.constants["TOKENS"] * launch.constants["COLUMNS"] == tile_words


@pytest.mark.parametrize(
    ("source", "head", "count", "word_bytes", "alignment"),
    [
        (pool(), 0, 8, 8, 16),
        (pool(), 3, 1, 8, 16),
        (pool(row_bytes=576, heads=8), 0, 8, 8, 16),  # heads of 72 bytes, whole rows
        (pool(row_bytes=576, heads=8), 2, 2, 8, 16),
        (pool(row_bytes=576, heads=8), 1, 2, 8, 8),
        (pool(row_bytes=576, heads=8), 0, 1, 8, 8),
        (pool(row_bytes=16, heads=4), 1, 3, 4, 4),
        (pool(row_bytes=12, heads=2), 1, 1, 2, 2),
        (pool(row_bytes=5, heads=1), 0, 1, 1, 1),
        (pool(address=(1 << 20) + 8), 0, 8, 8, 8),
    ],
)
def test_words_are_as_wide_as_every_address_allows(
    source: KVPool, head: int, count: int, word_bytes: int, alignment: int
) -> None:
    staging = Staged(torch.zeros(1 << 16, dtype=torch.uint8))
    launch = plan(Paged(source, pages(1), head=head), staging, tokens=16, head_count=count)
    assert launch is not None
    assert (launch.constants["WORD_BYTES"], launch.constants["ALIGN_BYTES"]) == (word_bytes, alignment)


@pytest.mark.parametrize(("shift", "alignment"), [(0, 16), (8, 8), (4, 4), (6, 2), (1, 1)])
def test_staging_memory_may_start_anywhere(shift: int, alignment: int) -> None:
    staging = Staged(torch.zeros(shift + MANY, dtype=torch.uint8)[shift:])
    for sides in ((Paged(pool(), pages(1)), staging), (staging, Paged(pool(), pages(1)))):
        launch = plan(*sides, tokens=16, head_count=8)
        assert launch is not None
        assert launch.constants["ALIGN_BYTES"] == alignment


def test_requests_of_one_shape_share_a_compilation() -> None:
    constants = []
    for tokens, first in ((1, 0), (16, 16), (1000, 7)):
        source = Paged(pool(), pages(triton.cdiv(first + tokens, 16)), first)
        launch = plan(source, Paged(pool(page_size=1), pages(tokens)), tokens=tokens, head_count=8)
        assert launch is not None
        constants.append(launch.constants)
    assert constants[0] == constants[1] == constants[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_pages": pages(3)}, "target page list has 2 pages, wanted 3"),
        ({"source_pages": pages(3), "tokens": 32}, "source page list has 3 pages, wanted 2"),
        ({"tokens": 33}, "source page list has 2 pages, wanted 3"),
        ({"tokens": -1}, "-1 tokens to copy"),
        ({"source_first": 33}, "-1 tokens to copy"),
        ({"source_first": -1}, "first source token is -1"),
        ({"target_first": 1}, "target page list has 2 pages, wanted 3"),
        ({"target_first": -1, "tokens": 32}, "first target token is -1"),
        ({"source_pages": pages(2, torch.int16)}, r"source page list is torch.int16 \(2,\)"),
        ({"source_pages": pages(4)[::2]}, r"strides \(2,\), wanted contiguous"),
        ({"target_pages": pages(4).view(2, 2)}, r"target page list is torch.int32 \(2, 2\)"),
        ({"target_pages": pages(2).to("meta")}, "target page list is on meta, its pool on cpu"),
        ({"target": pool(buffers=3)}, "source has 2 buffers with heads of .256. bytes, the target 3"),
        ({"target": pool(row_bytes=1024)}, "with heads of .256. bytes, the target 2 of .128."),
        ({"target": pool(row_bytes=1024, heads=4)}, "of the target, which has 4 heads"),
        ({"head_count": 0}, "0 heads to copy"),
        ({"source_head": 1}, r"Heads \[1, 9\) are wanted of the source, which has 8"),
        ({"source_head": -1}, r"Heads \[-1, 7\) are wanted"),
        ({"target_head": 5, "head_count": 4}, r"Heads \[5, 9\) are wanted of the target"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "source": pool(),
        "target": pool(),
        "source_pages": pages(2),
        "target_pages": pages(2),
    }
    with pytest.raises(ValueError, match=message):
        copy_pages(**arguments | change)


def test_more_buffers_than_a_grid_has_are_refused() -> None:
    with pytest.raises(ValueError, match="Copy in parts"):
        plan(Paged(pool(buffers=MANY), pages(1)), Paged(pool(buffers=MANY), pages(1)), tokens=1, head_count=8)


@pytest.mark.skipif(not isinstance(rows.copy_rows, triton.JITFunction), reason="needs TRITON_INTERPRET to be unset")
def test_a_pool_on_the_cpu_is_refused_where_the_kernel_is_compiled() -> None:
    with pytest.raises(ValueError, match="needs a CUDA device"):
        copy_pages(pool(), pool(), pages(1), pages(1))
