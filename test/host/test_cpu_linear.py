"""Products through oneDNN equal torch's own, packed or not; an update packs again; the rest is left to SGLang."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import psutil
import pytest
import torch

pytest.importorskip("sglang", reason="waits for SGLang: run `make setup`")

from sglang_prefillshare.host.cpu import linear as cpu_linear
from sglang_prefillshare.host.cpu.linear import apply, compute_lm_head, forget_packed

MARKER = torch.ones(1)
# Sums of 96 products of about 1; bfloat16 has 8 bits.
TOLERANCE = {torch.float32: {"atol": 2e-5, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 1e-2}}


def never(*_args: object, **_kwargs: object) -> torch.Tensor:
    raise AssertionError("a plain product must not fall back")


def marker(*_args: object, **_kwargs: object) -> torch.Tensor:
    return MARKER


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return apply(never, None, SimpleNamespace(weight=weight), x, bias)


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    if request.param not in cpu_linear._DTYPES:
        pytest.skip("waits for a processor on which oneDNN computes in bfloat16")
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture
def short_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=1000, available=100))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 300])
def test_it_equals_torchs_own(tokens: int, has_bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    x, weight = (torch.randn(rows, 96, generator=generator).to(dtype) for rows in (tokens, 160))
    bias = torch.randn(160, generator=generator).to(dtype) if has_bias else None
    wanted = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double()).to(dtype)
    for _ in range(2):  # packs, has packed
        torch.testing.assert_close(product(x, weight, bias), wanted, **TOLERANCE[dtype])
    if bias is None:
        logits = compute_lm_head(never, None, x, SimpleNamespace(weight=weight))
        torch.testing.assert_close(logits, wanted, **TOLERANCE[dtype])


def test_a_weight_is_packed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = []
    monkeypatch.setattr(cpu_linear, "_pack", lambda weight: packed.append(weight) or weight)
    weight = torch.ones(3, 4)
    for _ in range(3):
        product(torch.ones(2, 4), weight)
    assert len(packed) == 1


def test_weights_that_are_updated_in_place_are_packed_again() -> None:
    model = torch.nn.Linear(4, 3, bias=False).requires_grad_(False)
    x = torch.ones(2, 4)
    product(x, model.weight)
    forget_packed(SimpleNamespace(get_model=lambda: model), "update_weights_from_disk")
    model.weight.data.fill_(2.0)
    assert product(x, model.weight).tolist() == [[8.0] * 3] * 2


def test_without_memory_nothing_is_packed_and_it_is_said_once(
    short_memory: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cpu_linear, "_has_warned", False)
    weights = [torch.full((3, 4), float(number)) for number in (1, 2)]
    with caplog.at_level(logging.WARNING):
        for weight in weights:
            assert product(torch.ones(2, 4), weight).tolist() == [[4 * weight[0, 0].item()] * 3] * 2
            assert cpu_linear._pack(weight) is weight
    assert len(caplog.records) == 1
    x, weight = torch.ones(2, 4).bfloat16(), torch.ones(3, 4).bfloat16()
    assert apply(marker, None, SimpleNamespace(weight=weight), x) is MARKER  # torch takes oneDNN for it anyway


def test_what_is_not_a_plain_product_is_left_to_sglang() -> None:
    x, weight = torch.zeros(2, 4), torch.zeros(3, 4)
    assert apply(marker, None, SimpleNamespace(weight=weight.double()), x.double()) is MARKER
    assert apply(marker, None, SimpleNamespace(weight=weight.bfloat16()), x) is MARKER
    assert apply(marker, None, SimpleNamespace(weight=weight), x[None]) is MARKER
    assert apply(marker, None, SimpleNamespace(weight=weight), x[:0]) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace(weight=weight, set_lora=1, apply_lora=1)) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace(weight=weight), out=torch.zeros(2, 3)) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace(weight=weight.to(torch.int8))) is MARKER
    assert compute_lm_head(marker, None, x, SimpleNamespace()) is MARKER
    assert compute_lm_head(marker, SimpleNamespace(use_fp32_lm_head=True), x, SimpleNamespace(weight=weight)) is MARKER
