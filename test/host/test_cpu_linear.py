"""float32 products through oneDNN equal torch's own; what is not a plain float32 product is left to SGLang."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang_prefillshare.host.cpu_linear import apply, compute_lm_head

MARKER = torch.ones(1)


def never(*_args: object, **_kwargs: object) -> torch.Tensor:
    raise AssertionError("a plain float32 product must not fall back")


def marker(*_args: object, **_kwargs: object) -> torch.Tensor:
    return MARKER


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_it_equals_torchs_own(tokens: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight = torch.randn(tokens, 96, generator=generator), torch.randn(160, 96, generator=generator)
    bias = torch.randn(160, generator=generator) if has_bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()
    # float32 sums of 96 products of about 1
    torch.testing.assert_close(
        apply(never, None, SimpleNamespace(weight=weight), x, bias), wanted, atol=2e-5, rtol=1e-5
    )
    if bias is None:
        logits = compute_lm_head(never, None, x, SimpleNamespace(weight=weight))
        torch.testing.assert_close(logits, wanted, atol=2e-5, rtol=1e-5)


def test_what_is_not_a_plain_float32_product_is_left_to_sglang() -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    assert apply(marker, None, SimpleNamespace(weight=weight.bfloat16()), x.bfloat16()) is MARKER
    assert apply(marker, None, SimpleNamespace(weight=weight), x[None]) is MARKER
    assert apply(marker, None, SimpleNamespace(weight=weight), x[:0]) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace(weight=weight, set_lora=1, apply_lora=1)) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace(weight=weight), out=torch.zeros(2, 3)) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace(weight=weight.to(torch.int8))) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace()) is MARKER
