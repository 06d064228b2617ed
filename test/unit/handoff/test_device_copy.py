"""`handoff/device_copy.py`: on a GPU where there is one, else with the kernels interpreted on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="waits for Triton: run `make setup`")

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.device_copy import DeviceCopier
from sglang_prefillshare.handoff.pool import PageList, PoolView
from sglang_prefillshare.handoff.ranks import HeadSlice, Rank, slice_between
from test.kernels.conftest import device  # noqa: F401 - a fixture


def pages(*numbers: int) -> PageList:
    return np.asarray(numbers, dtype=np.int32)


def buffers(place: torch.device, *, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (9, 48), generator=generator, dtype=torch.uint8).to(place) for _ in range(4)]


def test_pages_arrive_bit_for_bit_and_no_other_page_changes(device: torch.device) -> None:  # noqa: F811
    source, target = buffers(device, seed=1), buffers(device, seed=2)
    expected = [buffer.clone() for buffer in target]
    from_pages, onto_pages = [5, 3, 4, 8, 3], [1, 7, 2, 0, 5]
    for buffer, original in zip(expected, source, strict=True):
        for read, write in zip(from_pages, onto_pages, strict=True):
            buffer[write] = original[read]
    copy = DeviceCopier(device)
    views = PoolView.of_tensors(source), PoolView.of_tensors(target)
    for _ in range(2):  # with what is kept of the pools, too
        copy(*views, pages(*from_pages), pages(*onto_pages))
        assert all(torch.equal(found, wanted) for found, wanted in zip(target, expected, strict=True))
    copy(*views, pages(), pages())
    copy.forget(views[0])


def test_a_page_that_is_not_there_is_refused_before_anything_is_written(device: torch.device) -> None:  # noqa: F811
    source, target = buffers(device, seed=1), buffers(device, seed=2)
    before = [buffer.clone() for buffer in target]
    with pytest.raises(HandoffError, match=r"the source names page 1\.\.9 of a pool with 9 pages"):
        DeviceCopier(device)(PoolView.of_tensors(source), PoolView.of_tensors(target), pages(1, 9), pages(1, 2))
    assert all(torch.equal(found, wanted) for found, wanted in zip(target, before, strict=True))


@pytest.mark.parametrize(("prefill", "decode"), [(Rank(1, 2), Rank()), (Rank(), Rank(1, 2))], ids=["2:1", "1:2"])
def test_some_heads_of_a_row_move_and_the_others_stay(
    prefill: Rank,
    decode: Rank,
    device: torch.device,  # noqa: F811
) -> None:
    """Of two heads, pages of four tokens: the second head of the wider side and the only one of the other."""
    heads = slice_between(prefill, decode, total=2, page_size=4)
    assert heads is not None

    def rows(seed: int, count: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(256, (9, 4, count, 48), generator=generator, dtype=torch.uint8).to(device) for _ in "kv"]

    source, target = rows(1, heads.source_heads), rows(2, heads.target_heads)
    expected = [buffer.clone() for buffer in target]
    for buffer, original in zip(expected, source, strict=True):
        buffer[[1, 7], :, -1] = original[[5, 3], :, -1]
    copy = DeviceCopier(device)
    views = PoolView.of_tensors(source), PoolView.of_tensors(target)
    copy.prepare(*views, heads)
    copy(*views, pages(5, 3), pages(1, 7), heads)
    assert all(torch.equal(found, wanted) for found, wanted in zip(target, expected, strict=True))
    with pytest.raises(HandoffError, match="source pages have"):
        copy.prepare(*views, HeadSlice(4, 2, 2, 0, 0, 1))
