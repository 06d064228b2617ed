"""`handoff/geometry.py`: two pools fit only if a page means the same bytes in both."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_prefillshare.errors import HandoffError
from sglang_prefillshare.handoff.geometry import KVGeometry

GEOMETRY = KVGeometry(page_size=16, kv_dtype="bfloat16", page_bytes=(4096, 4096, 2048, 2048))


def check(other: KVGeometry) -> None:
    GEOMETRY.check_same(other, mine="decode", theirs="prefill worker 7")


def test_an_equal_geometry_passes() -> None:
    check(KVGeometry(page_size=16, kv_dtype="bfloat16", page_bytes=(4096, 4096, 2048, 2048)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"page_size": 1}, "prefill worker 7 has page_size 1, decode has 16.*the same --page-size"),
        ({"kv_dtype": "float16"}, "kv_dtype float16, decode has bfloat16.*--dtype and --kv-cache-dtype"),
        ({"page_bytes": (4096, 4096, 2048)}, "prefill worker 7 keeps 3 KV buffers.*decode 4"),
        ({"page_bytes": (4096, 4096, 4096, 4096)}, r"4 KV buffers of \[4096\].*4 of \[2048, 4096\]"),
        ({"page_bytes": (2048, 2048, 4096, 4096)}, "different shapes"),  # the same sizes, of other buffers
    ],
)
def test_the_first_difference_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(HandoffError, match=message):
        check(msgspec.structs.replace(GEOMETRY, **change))


geometries = st.builds(
    KVGeometry,
    page_size=st.integers(1, 2),
    kv_dtype=st.sampled_from(["float16", "bfloat16"]),
    page_bytes=st.lists(st.integers(1, 2), max_size=2).map(tuple),
)


@given(mine=geometries, other=geometries)
def test_only_equal_geometries_pass(mine: KVGeometry, other: KVGeometry) -> None:
    if mine == other:
        mine.check_same(other, mine="decode", theirs="prefill")
    else:
        with pytest.raises(HandoffError):
            mine.check_same(other, mine="decode", theirs="prefill")


def test_a_page_takes_its_bytes_in_every_buffer() -> None:
    assert GEOMETRY.bytes_per_page == 2 * 4096 + 2 * 2048
