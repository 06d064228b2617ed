"""Attention for new tokens over a cached prefix, and that of decode, equal SGLang's own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang.srt.plugins import load_plugins

load_plugins()

from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend  # noqa: E402

from sglang_prefillshare.host.cpu.attention import run_sdpa_forward_decode, run_sdpa_forward_extend  # noqa: E402

HEADS, KV_HEADS, HEAD_DIM, SLOTS = 6, 2, 32, 3000


@pytest.mark.parametrize(
    "requests",
    [[(0, 1)], [(0, 700)], [(1, 1)], [(1200, 30)], [(511, 513)], [(100, 30), (0, 5), (17, 600)]],
    ids=str,
)
def test_it_equals_sglangs_own(requests: list[tuple[int, int]]) -> None:
    """`requests` are (cached tokens, new tokens)."""
    generator = torch.Generator().manual_seed(len(requests) + requests[0][0])
    cached, new = (torch.tensor(column) for column in zip(*requests, strict=True))
    query = torch.randn(int(new.sum()), HEADS, HEAD_DIM, generator=generator)
    key, value = (torch.randn(SLOTS, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2))
    slots = torch.stack([torch.randperm(SLOTS, generator=generator)[:2000] for _ in requests])
    rest = (key, value, slots, torch.arange(len(requests)), cached + new, cached, new)
    settings = {"scaling": HEAD_DIM**-0.5, "enable_gqa": True, "causal": True}
    original = TorchNativeAttnBackend._run_sdpa_forward_extend
    while hasattr(original, "__wrapped__"):
        original = original.__wrapped__

    def never(*_args: object) -> torch.Tensor:
        raise AssertionError("plain causal attention must not fall back")

    wanted = original(None, query, torch.full_like(query, torch.nan), *rest, **settings)
    found = run_sdpa_forward_extend(never, None, query, torch.full_like(query, torch.nan), *rest, **settings)
    # float32 sums over up to 1,230 keys in another order
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, HEADS], ids="{} KV heads".format)
@pytest.mark.parametrize("lengths", [[1], [700], [1, 1500, 33]], ids=str)
def test_decode_equals_sglangs_own(lengths: list[int], kv_heads: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(kv_heads)
    query = torch.randn(len(lengths), HEADS, HEAD_DIM, generator=generator).to(dtype)
    key, value = (torch.randn(SLOTS, kv_heads, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    slots = torch.stack([torch.randperm(SLOTS, generator=generator)[:2000] for _ in range(5)])
    rest = (key, value, slots, torch.tensor([4, 0, 2])[: len(lengths)], torch.tensor(lengths))
    settings = {"scaling": HEAD_DIM**-0.5, "enable_gqa": kv_heads != HEADS}
    original = TorchNativeAttnBackend._run_sdpa_forward_decode
    while hasattr(original, "__wrapped__"):
        original = original.__wrapped__

    def never(*_args: object) -> torch.Tensor:
        raise AssertionError("plain attention must not fall back")

    # Within one rounding of what float32 gives, which SGLang's own is, too.
    exact = torch.full_like(query, torch.nan, dtype=torch.float32)
    original(None, query.float(), exact, key.float(), value.float(), *rest[2:], **settings)
    found = run_sdpa_forward_decode(never, None, query, torch.full_like(query, torch.nan), *rest, **settings)
    tolerance = {"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-3, "rtol": 8e-3}
    torch.testing.assert_close(found.float(), exact, **tolerance)


def test_a_window_is_left_to_sglang() -> None:
    one = torch.tensor([1])
    query = torch.zeros(1, HEADS, HEAD_DIM)
    marker = torch.ones(1)

    def original(*_args: object) -> torch.Tensor:
        return marker

    cache = torch.zeros(4, KV_HEADS, HEAD_DIM)
    found = run_sdpa_forward_extend(
        original, None, query, query, cache, cache, torch.zeros(1, 4, dtype=torch.int64), one - 1, one, one - 1, one,
        causal=True, sliding_window_size=8,
    )  # fmt: skip
    assert found is marker
    found = run_sdpa_forward_decode(
        original, None, query, query, cache, cache, torch.zeros(1, 4, dtype=torch.int64), one - 1, one,
        sliding_window_size=8,
    )  # fmt: skip
    assert found is marker
