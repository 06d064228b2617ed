"""`KVPool` and `check_pages`: what describes a pool, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefillshare_kernels.pool import KVPool, check_pages

CPU = torch.device("cpu")


def test_tensors_are_described_by_address_and_width() -> None:
    keys, values = torch.zeros(64, 4, 192, dtype=torch.bfloat16), torch.zeros(64, 4, 128, dtype=torch.bfloat16)
    pool = KVPool.from_tensors([keys, values], page_size=16)
    assert pool == KVPool(
        addresses=(keys.data_ptr(), values.data_ptr()),
        row_bytes=(1536, 1024),
        page_size=16,
        page_count=4,
        device=CPU,
        heads=4,
    )
    assert pool.head_bytes == (384, 256)
    assert pool.table.tolist() == [[keys.data_ptr(), 384, 0], [values.data_ptr(), 256, 384]]


def test_buffers_without_heads_have_one() -> None:
    pool = KVPool.from_tensors([torch.zeros(4, 576, dtype=torch.float8_e4m3fn)], page_size=1)
    assert (pool.heads, pool.head_bytes, pool.page_count) == (1, (576,), 4)


@pytest.mark.parametrize(
    ("address", "row_bytes", "alignment"),
    [(1 << 20, 1152, 16), (1 << 20, 1160, 8), ((1 << 20) + 4, 1152, 4), (1 << 20, 6, 2), (1 << 20, 7, 1)],
)
def test_alignment_is_what_address_and_rows_share(address: int, row_bytes: int, alignment: int) -> None:
    assert KVPool((1 << 30, address), (64, row_bytes), 1, 1, CPU).alignment_bytes == alignment


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"addresses": ()}, "has 0 addresses and 2 row widths"),
        ({"row_bytes": (64,)}, "has 2 addresses and 1 row widths"),
        ({"addresses": (4096, 0)}, "Buffer 1 lies at address 0x0"),
        ({"row_bytes": (64, 66)}, "Rows of buffer 1 are 66 bytes wide"),
        ({"page_size": 0}, "page_size is 0"),
        ({"heads": 0}, "heads is 0"),
        ({"page_count": -1}, "page_count is -1"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "addresses": (4096, 8192),
        "row_bytes": (64, 64),
        "page_size": 16,
        "page_count": 4,
        "device": CPU,
        "heads": 4,
    }
    KVPool(**arguments)
    with pytest.raises(ValueError, match=message):
        KVPool(**arguments | change)


@pytest.mark.parametrize(
    ("buffers", "page_size", "message"),
    [
        ([], 1, "A pool of 0 buffers"),
        ([torch.zeros(4)], 1, r"Buffer 0 has shape \(4,\)"),
        (
            [torch.zeros(4, 2, 8), torch.zeros(4, 8, 2).mT],
            1,
            r"Buffer 1 has shape \(4, 2, 8\) and strides \(16, 1, 2\)",
        ),
        ([torch.zeros(4, 2, 8), torch.zeros(5, 2, 8)], 1, "Buffer 1 has 5 slots and 2 heads"),
        ([torch.zeros(4, 2, 8), torch.zeros(4, 1, 8)], 1, "Buffer 1 has 4 slots and 1 heads"),
        ([torch.zeros(4, 2, 8), torch.zeros(4, 2, 8, device="meta")], 1, "2 heads on meta"),
        ([torch.zeros(4, 2, 8)], 3, "4 slots, which is no multiple of the page size, 3"),
        ([torch.zeros(4, 2, 8)], 0, "page_size is 0"),
    ],
)
def test_tensors_that_are_no_pool_are_refused(buffers: list[torch.Tensor], page_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVPool.from_tensors(buffers, page_size=page_size)


@given(numbers=st.lists(st.integers(-2, 9), max_size=6), page_count=st.integers(0, 8), is_array=st.booleans())
def test_pages_outside_the_pool_or_twice_are_refused(numbers: list[int], page_count: int, is_array: bool) -> None:
    pool = KVPool((4096,), (64,), 16, page_count, CPU)
    pages = np.asarray(numbers, dtype=np.int32) if is_array else numbers
    if not all(0 <= number < page_count for number in numbers):
        with pytest.raises(ValueError, match=rf"decode names page -?\d+, wanted pages in \[0, {page_count}\)"):
            check_pages(pages, pool, whose="decode")
        return
    check_pages(pages, pool, whose="decode")
    if len(set(numbers)) == len(numbers):
        check_pages(pages, pool, whose="decode", are_distinct=True)
        return
    with pytest.raises(ValueError, match=r"decode names page \d \d times"):
        check_pages(pages, pool, whose="decode", are_distinct=True)


def test_importing_the_package_loads_neither_torch_nor_triton() -> None:
    code = (
        "import sys; before = set(sys.modules); import prefillshare_kernels; "
        "sys.exit(any(name in sys.modules for name in {'torch', 'triton', 'numpy'} - before))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})
